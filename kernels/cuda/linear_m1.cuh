// y = epilogue(LayerNorm(x) * weight^T) of one row x [K]; the LayerNorm if norm_weight is given. Module:
// linear_m1_BITS.
//
// Shapes: weight [N, K], quantised (BITS = 8, 4) or half (16).
// Grid: any; block: 256, two to a multiprocessor. Alignment: weight, its rows and x to 16 bytes.
// Shared memory: the ring (STAGES * 8192 bytes), x padded to rounds of the ring, weight and bias of the LayerNorm (4 *
//   K).
// Pipeline: a block owns 16 weight rows at a time, each of its 8 warps every eighth 64 bytes of them. Each thread
//   keeps STAGES cp.async copies in flight for each row, from before pdl_wait (weights depend on no kernel) to the
//   end, across tiles. It reads only what it copied itself, so the ring needs no barrier. A deeper ring delays the
//   traffic between kernels.
// Products: on the tensor cores, whose 8 columns are equal, as x is broadcast.
#pragma once

#include "kernels/cuda/dequantize.cuh"
#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/layer_norm.cuh"
#include "kernels/cuda/mma.cuh"

static_assert(BITS == 8 || BITS == 4 || BITS == 16, "");
constexpr int WARPS = 8;
constexpr int STAGES = __CUDA_ARCH__ >= 800 ? 4 : 2;  // cuda_plans.ring_stages
constexpr int ROUND = STAGES * WARPS * 64;            // bytes of a weight row in flight

struct LinearM1 {
    const unsigned char* weight;
    const u16* x;
    Epilogue epilogue;
    Norm norm;
    int N, K;
};

struct Ring {
    uint4* place;            // of this thread, in shared memory: every 256th 16 bytes
    const unsigned char* p;  // in global memory: this thread's bytes of a round, row g
    size_t stride;           // from there to row g + 8
    int left, rows_left;     // bytes of the row and rows from there on
    __device__ __forceinline__ void point_at(const LinearM1& a, int tile, int round) {
        const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
        const int row_bytes = a.K * BITS / 8, byte = round * ROUND + warp * 64 + t * 16, n = tile * 16 + g;
        p = a.weight + (size_t)n * row_bytes + byte;
        stride = 8 * (size_t)row_bytes;
        left = row_bytes - byte;
        rows_left = a.N - n;
    }
    __device__ __forceinline__ void fetch(int r) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const bool inside = r * WARPS * 64 < left && h * 8 < rows_left;
            cp_async(place + (r * 2 + h) * 256, inside ? p + h * stride + r * WARPS * 64 : p, inside);
        }
        cp_async_commit();
    }
};

extern "C" __global__ void __launch_bounds__(256, 2) linear_m1(const __grid_constant__ LinearM1 a) {
    constexpr int CHUNK = 128 / BITS;  // weights in 16 bytes
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int rounds = (a.K * BITS / 8 + ROUND - 1) / ROUND, tiles = (a.N + 15) / 16;
    extern __shared__ uint4 ring_and_x[];
    __shared__ float partials[2][WARPS][16], sums[32];
    uint4* x = ring_and_x + STAGES * 512;
    uint4* norm = x + rounds * (ROUND / BITS);  // weight, then bias; x is padded
    Ring ring;
    ring.place = ring_and_x + threadIdx.x;
    pdl_launch_dependents();
    ring.point_at(a, blockIdx.x, 0);
#pragma unroll
    for (int r = 0; r < STAGES; r++) ring.fetch(r);
    for (int i = threadIdx.x; i < a.K / 8 && a.norm.norm_weight; i += WARPS * 32) {
        norm[i] = ((const uint4*)a.norm.norm_weight)[i];
        norm[a.K / 8 + i] = ((const uint4*)a.norm.norm_bias)[i];
    }
    pdl_wait();
    for (int i = threadIdx.x; i < rounds * (ROUND / BITS); i += WARPS * 32)
        x[i] = i * 8 < a.K ? __ldcg((const uint4*)a.x + i) : make_uint4(0, 0, 0, 0);
    // No barrier: each thread reads what it stored itself.
    if (a.norm.norm_weight) layer_norm_row(x, norm, norm + a.K / 8, a.norm.normed, a.norm.epsilon, a.K, sums);
    __syncthreads();
    const uint4* my_x = x + (warp * 4 + t) * CHUNK / 8;
    int buffer = 0;  // double buffer of partial sums: one barrier a tile
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, buffer ^= 1) {
        float even[4] = {0, 0, 0, 0}, odd[4] = {0, 0, 0, 0};
        // A thread finishes one output. Its operands are loaded before the products.
        const int n = tile * 16 + threadIdx.x;
        const EpilogueOperands operands = load_operands(a.epilogue, threadIdx.x / 16, n, 1, a.N);
        for (int round = 0; round < rounds; round++) {
            if (round + 1 < rounds)
                ring.point_at(a, tile, round + 1);
            else
                ring.point_at(a, tile + gridDim.x, 0);
            const uint4* round_x = my_x + round * (ROUND / BITS);
#pragma unroll
            for (int r = 0; r < STAGES; r++) {
                const uint4* xs = round_x + r * WARPS * 4 * CHUNK / 8;
                cp_async_wait<STAGES - 1>();
                const uint4 first = ring.place[r * 512], second = ring.place[r * 512 + 256];
                const u32 w[4] = {first.x, first.y, first.z, first.w}, v[4] = {second.x, second.y, second.z, second.w};
#pragma unroll
                for (int j = 0; j < CHUNK / 8; j++) {  // 8 weights of both rows
                    const uint4 b = xs[j];
                    u32 c[4], d[4];
                    dequantize8<BITS>(w, j, c);
                    dequantize8<BITS>(v, j, d);
                    mma_m16n8k16(even, c[0], d[0], c[1], d[1], b.x, b.y);
                    mma_m16n8k16(odd, c[2], d[2], c[3], d[3], b.z, b.w);
                }
                ring.fetch(r);
            }
        }
        if (t == 0) {
            partials[buffer][warp][g] = even[0] + odd[0];
            partials[buffer][warp][g + 8] = even[2] + odd[2];
        }
        __syncthreads();
        if (threadIdx.x < 16 && n < a.N) {
            float sum = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += partials[buffer][w][threadIdx.x];
            store_output(a.epilogue, operands, sum, 0, n, a.N);
        }
    }
}
