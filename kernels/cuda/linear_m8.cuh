// A linear of 2 to 8 rows of x: as of one row (linear_m1), with 16 * HEIGHT weight rows to a block.
#pragma once

#include "kernels/cuda/dequantize.cuh"
#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/mma.cuh"

#define WARPS 8
#if __CUDA_ARCH__ >= 800
#define RING 4
#else
#define RING 2
#endif

template <int BITS, int HEIGHT>
__device__ __forceinline__ void rows(const unsigned char* __restrict__ weight, const u16* x, const Epilogue& e, int M,
                                     int N, int K) {
    constexpr int COLUMNS = 8, DEPTH = RING / HEIGHT;
    constexpr int CHUNK = 128 / BITS;         // weights in 16 bytes
    constexpr int STEP = 4 * CHUNK;           // weights in 64 bytes
    constexpr int SPAN = DEPTH * WARPS * 64;  // bytes of a row that are under way
    constexpr int TILE = 16 * HEIGHT;
    extern __shared__ uint4 shared_x[];
    __shared__ float part[2][WARPS][TILE * COLUMNS];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const size_t row_bytes = (size_t)K * BITS / 8;
    const int turns = (row_bytes + SPAN - 1) / SPAN;  // of a tile
    const int tiles = (N + TILE - 1) / TILE;
    const int stride = turns * (SPAN * 8 / BITS) + 8;

    uint4 ring[DEPTH][2 * HEIGHT];
    // Where this thread's bytes of a turn begin, in row g, and how many weights there are from there on.
    const unsigned char* p;
    int left, rows_left;
    auto point_at = [&](int tile, int turn) {
        const int k = (turn * DEPTH * WARPS + warp) * STEP + t * CHUNK, n = tile * TILE + g;
        p = weight + n * row_bytes + (size_t)k * BITS / 8;
        left = K - k;
        rows_left = N - n;
    };
    auto fetch = [&](int r) {
#pragma unroll
        for (int h = 0; h < 2 * HEIGHT; h++)
            ring[r][h] =
                load_stream(p + h * 8 * row_bytes + r * WARPS * 64, r * WARPS * STEP < left && h * 8 < rows_left);
    };

    start_next();
    point_at(blockIdx.x, 0);
#pragma unroll
    for (int r = 0; r < DEPTH; r++) fetch(r);
    wait();
    for (int i = threadIdx.x; i < M * (stride / 8); i += WARPS * 32) {
        const int m = i / (stride / 8), k = (i % (stride / 8)) * 8;
        copy_async(&shared_x[i], k < K ? x + (size_t)m * K + k : x, k < K);
    }
    commit();
    wait_copies<0>();
    __syncthreads();
    const u16* my_x = (u16*)shared_x + min(g, M - 1) * stride + warp * STEP + t * CHUNK;

    int buffer = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, buffer ^= 1) {
        float even[HEIGHT][4], odd[HEIGHT][4];
#pragma unroll
        for (int h = 0; h < HEIGHT; h++)
#pragma unroll
            for (int i = 0; i < 4; i++) even[h][i] = odd[h][i] = 0;
        // One thread finishes one sum; what it needs for that is loaded early.
        const int m = threadIdx.x / TILE, n = tile * TILE + threadIdx.x % TILE;
        const Finish end = prepare(e, m, n, M, N);
        for (int turn = 0; turn < turns; turn++) {
            const bool last = turn + 1 == turns;
            point_at(last ? tile + gridDim.x : tile, last ? 0 : turn + 1);
            const uint4* turn_x = (const uint4*)(my_x + turn * (SPAN * 8 / BITS));
#pragma unroll
            for (int r = 0; r < DEPTH; r++) {
                const uint4* xs = turn_x + r * WARPS * STEP / 8;
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
                        if (BITS == 8) {
                            widen8(w[2 * h][2 * j], c);
                            widen8(w[2 * h][2 * j + 1], c + 2);
                            widen8(w[2 * h + 1][2 * j], d);
                            widen8(w[2 * h + 1][2 * j + 1], d + 2);
                        } else {
                            widen4(w[2 * h][j], c);
                            widen4(w[2 * h + 1][j], d);
                        }
                        multiply(even[h], c[0], d[0], c[1], d[1], b.x, b.y);
                        multiply(odd[h], c[2], d[2], c[3], d[3], b.z, b.w);
                    }
                }
                fetch(r);
            }
        }
        float* mine = part[buffer][warp];
#pragma unroll
        for (int h = 0; h < HEIGHT; h++)
#pragma unroll
            for (int i = 0; i < 4; i++) mine[(2 * t + i % 2) * TILE + h * 16 + i / 2 * 8 + g] = even[h][i] + odd[h][i];
        __syncthreads();
        if (m < M && n < N) {
            float sum = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += part[buffer][w][threadIdx.x];
            finish(e, end, sum, m, n, N);
        }
    }
}
#define ROWS(NAME, BITS, HEIGHT)                                                                                \
    extern "C" __global__ void __launch_bounds__(256, 2)                                                        \
        NAME(const unsigned char* weight, const u16* x, const u16* scale, const u16* bias, const u16* residual, \
             float alpha, int use_gelu, u16* y, int M, int N, int K) {                                          \
        const Epilogue e = {scale, bias, residual, alpha, use_gelu, y};                                         \
        rows<BITS, HEIGHT>(weight, x, e, M, N, K);                                                              \
    }
