// y = epilogue(x * weight^T) of 2 to 8 rows x [M, K]. Module: linear_m8_BITS.
//
// Shapes: quantised weight [N, K].
// Grid: any; block: 256, two to a multiprocessor. Alignment: weight, its rows and x to 16 bytes.
// Shared memory: x, its rows padded to rounds of the ring and by 8.
// Pipeline: that of linear_m1, with the ring in registers and 16 * HEIGHT weight rows to a block.
#pragma once

#include "kernels/cuda/dequantize.cuh"
#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/mma.cuh"

static_assert(BITS == 8 || BITS == 4, "");
constexpr int HEIGHT = BITS == 4 ? 2 : 1;                        // fragments of 16 weight rows; as in cuda_plans
constexpr int STAGES = (__CUDA_ARCH__ >= 800 ? 4 : 2) / HEIGHT;  // cuda_plans.ring_stages
constexpr int WARPS = 8, TILE_M = 8, TILE_N = 16 * HEIGHT;
constexpr int CHUNK = 128 / BITS;           // weights in 16 bytes
constexpr int STEP = 4 * CHUNK;             // weights in 64 bytes
constexpr int ROUND = STAGES * WARPS * 64;  // bytes of a weight row in flight

struct LinearM8 {
    const unsigned char* weight;
    const u16* x;
    Epilogue epilogue;
    int M, N, K;
};

extern "C" __global__ void __launch_bounds__(256, 2) linear_m8(const LinearM8 a) {
    const unsigned char* const weight = a.weight;
    const u16* const x = a.x;
    const Epilogue epilogue = a.epilogue;
    const int M = a.M, N = a.N, K = a.K;
    extern __shared__ uint4 shared_x[];
    __shared__ float partials[2][WARPS][TILE_N * TILE_M];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const size_t row_bytes = (size_t)K * BITS / 8;
    const int rounds = (row_bytes + ROUND - 1) / ROUND;
    const int tiles = (N + TILE_N - 1) / TILE_N;
    const int stride = rounds * (ROUND * 8 / BITS) + 8;

    uint4 ring[STAGES][2 * HEIGHT];
    // This thread's bytes of a round, row g; weights of the row and rows from there on.
    const unsigned char* p;
    int left, rows_left;
    auto point_at = [&](int tile, int round) {
        const int k = (round * STAGES * WARPS + warp) * STEP + t * CHUNK, n = tile * TILE_N + g;
        p = weight + n * row_bytes + (size_t)k * BITS / 8;
        left = K - k;
        rows_left = N - n;
    };
    auto fetch = [&](int r) {
#pragma unroll
        for (int h = 0; h < 2 * HEIGHT; h++)
            ring[r][h] =
                load_streaming(p + h * 8 * row_bytes + r * WARPS * 64, r * WARPS * STEP < left && h * 8 < rows_left);
    };

    pdl_launch_dependents();
    point_at(blockIdx.x, 0);
#pragma unroll
    for (int r = 0; r < STAGES; r++) fetch(r);
    pdl_wait();
    for (int i = threadIdx.x; i < M * (stride / 8); i += WARPS * 32) {
        const int m = i / (stride / 8), k = (i % (stride / 8)) * 8;
        cp_async(&shared_x[i], k < K ? x + (size_t)m * K + k : x, k < K);
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    const u16* my_x = (u16*)shared_x + min(g, M - 1) * stride + warp * STEP + t * CHUNK;

    int buffer = 0;  // double buffer of partial sums: one barrier a tile
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, buffer ^= 1) {
        float even[HEIGHT][4], odd[HEIGHT][4];
#pragma unroll
        for (int h = 0; h < HEIGHT; h++)
#pragma unroll
            for (int i = 0; i < 4; i++) even[h][i] = odd[h][i] = 0;
        // A thread finishes one output. Its operands are loaded before the products.
        const int m = threadIdx.x / TILE_N, n = tile * TILE_N + threadIdx.x % TILE_N;
        const EpilogueOperands operands = load_operands(epilogue, m, n, M, N);
        for (int round = 0; round < rounds; round++) {
            const bool last = round + 1 == rounds;
            point_at(last ? tile + gridDim.x : tile, last ? 0 : round + 1);
            const uint4* round_x = (const uint4*)(my_x + round * (ROUND * 8 / BITS));
#pragma unroll
            for (int r = 0; r < STAGES; r++) {
                const uint4* xs = round_x + r * WARPS * STEP / 8;
                u32 w[2 * HEIGHT][4];
#pragma unroll
                for (int h = 0; h < 2 * HEIGHT; h++) {
                    w[h][0] = ring[r][h].x;
                    w[h][1] = ring[r][h].y;
                    w[h][2] = ring[r][h].z;
                    w[h][3] = ring[r][h].w;
                }
#pragma unroll
                for (int j = 0; j < CHUNK / 8; j++) {  // 8 weights of every row
                    const uint4 b = xs[j];
#pragma unroll
                    for (int h = 0; h < HEIGHT; h++) {
                        u32 c[4], d[4];
                        dequantize8<BITS>(w[2 * h], j, c);
                        dequantize8<BITS>(w[2 * h + 1], j, d);
                        mma_m16n8k16(even[h], c[0], d[0], c[1], d[1], b.x, b.y);
                        mma_m16n8k16(odd[h], c[2], d[2], c[3], d[3], b.z, b.w);
                    }
                }
                fetch(r);
            }
        }
        float* mine = partials[buffer][warp];
#pragma unroll
        for (int h = 0; h < HEIGHT; h++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                mine[(2 * t + i % 2) * TILE_N + h * 16 + i / 2 * 8 + g] = even[h][i] + odd[h][i];
        __syncthreads();
        if (m < M && n < N) {
            float sum = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += partials[buffer][w][threadIdx.x];
            store_output(epilogue, operands, sum, m, n, N);
        }
    }
}
