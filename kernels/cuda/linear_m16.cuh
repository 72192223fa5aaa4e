// A linear of 2 to 16 rows of x of up to 4096 columns: a block of 16 warps owns 16 weight rows at a time, each warp
// 1/16 of the columns, for which it has all of x in registers. Up to 64 KB of weights are on the way to shared memory
// at any time; as each thread reads what it has copied itself, warps meet but once a tile, to add up their sums. Grid:
// any; block: 512; weight, its rows and x aligned to 16 bytes.
#pragma once

#include "kernels/cuda/dequantize.cuh"
#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/layer_norm.cuh"
#include "kernels/cuda/mma.cuh"

struct Norm {
    const u16* weight;  // [K] or null: x is normalised first,
    const u16* bias;
    u16* normed;  // [M, K], and stored here
    float epsilon;
};

template <int BITS, int MT>
__device__ __forceinline__ void few_rows(const unsigned char* __restrict__ weight, const u16* x, const Norm& norm,
                                         const Epilogue& e, int M, int N, int K) {
    constexpr int CHUNK = 128 / BITS, NT = MT / 8, WARPS = 16, THREADS = 512;
    constexpr int SLOTS = 4096 * BITS / 8 / WARPS / 64;  // 64 bytes of a row, for each warp
    constexpr int DEPTH = 4 / SLOTS;                     // tiles under way
    constexpr int HEIGHT = 16, PITCH = HEIGHT + 4;
    extern __shared__ uint4 shared[];
    float* const all_parts = (float*)(shared + 4 * 2 * THREADS);  // [2][WARPS][MT * PITCH]
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int tiles = (N + HEIGHT - 1) / HEIGHT;
    const int row_bytes = K * BITS / 8, my_byte = warp * 64 + t * 16;
    uint4* ring = shared + threadIdx.x;  // this thread's bytes; every 512th is its own

    auto fetch = [&](int tile, int slot, int depth) {
        const int byte = my_byte + slot * WARPS * 64, n = tile * HEIGHT + g;
        const unsigned char* from = weight + (size_t)n * row_bytes + byte;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const bool inside = byte < row_bytes && n + h * 8 < N;
            copy_async(ring + ((depth * SLOTS + slot) * 2 + h) * THREADS,
                       inside ? from + h * 8 * (size_t)row_bytes : weight, inside);
        }
        commit();
    };
    start_next();
#pragma unroll
    for (int d = 0; d < DEPTH; d++)
#pragma unroll
        for (int r = 0; r < SLOTS; r++) fetch(blockIdx.x + d * gridDim.x, r, d);
    wait();
    uint4 my_x[SLOTS][NT][CHUNK / 8];
#pragma unroll
    for (int r = 0; r < SLOTS; r++)
#pragma unroll
        for (int c = 0; c < NT; c++)
#pragma unroll
            for (int j = 0; j < CHUNK / 8; j++) {
                const int m = c * 8 + g, k = (my_byte + r * WARPS * 64) * 8 / BITS + j * 8;
                my_x[r][c][j] = m < M && k < K ? __ldcg((const uint4*)(x + (size_t)m * K + k)) : make_uint4(0, 0, 0, 0);
            }

    if (norm.weight) {  // as `normalise` does it
        float mean[NT], scale[NT];
#pragma unroll
        for (int c = 0; c < NT; c++) mean[c] = 0;
        // Sums of every row of x: of its numbers, then of the squares of their distances from the mean.
        auto sum_rows = [&](float* parts, float (&totals)[NT], bool squares) {
#pragma unroll
            for (int c = 0; c < NT; c++) {
                float sum = 0;
#pragma unroll
                for (int r = 0; r < SLOTS; r++) {
#pragma unroll
                    for (int j = 0; j < CHUNK / 8; j++) {
                        const uint4 v = my_x[r][c][j];
                        const u32 words[4] = {v.x, v.y, v.z, v.w};
                        const bool inside = (my_byte + r * WARPS * 64) * 8 / BITS + j * 8 < K;
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            const float p = low(words[i]) - mean[c], q = high(words[i]) - mean[c];
                            if (inside) sum += squares ? p * p + q * q : p + q;
                        }
                    }
                }
                sum += __shfl_xor_sync(~0u, sum, 1);
                sum += __shfl_xor_sync(~0u, sum, 2);
                if (t == 0) parts[warp * MT + c * 8 + g] = sum;
            }
            __syncthreads();
#pragma unroll
            for (int c = 0; c < NT; c++) {
                float total = 0;
#pragma unroll
                for (int w = 0; w < WARPS; w++) total += parts[w * MT + c * 8 + g];
                totals[c] = total / K;
            }
        };
        float* const parts = all_parts + WARPS * MT * PITCH;  // the first tile has the other buffer
        sum_rows(parts, mean, false);
        sum_rows(parts + WARPS * MT, scale, true);
#pragma unroll
        for (int c = 0; c < NT; c++) scale[c] = rsqrtf(scale[c] + norm.epsilon);
#pragma unroll
        for (int r = 0; r < SLOTS; r++) {
#pragma unroll
            for (int j = 0; j < CHUNK / 8; j++) {
                const int k = (my_byte + r * WARPS * 64) * 8 / BITS + j * 8;
                if (k >= K) continue;
                const uint4 w = *(const uint4*)(norm.weight + k), b = *(const uint4*)(norm.bias + k);
#pragma unroll
                for (int c = 0; c < NT; c++) {
                    my_x[r][c][j] = normalised(my_x[r][c][j], mean[c], scale[c], w, b);
                    const int m = c * 8 + g;
                    if (blockIdx.x == 0 && m < M) *(uint4*)(norm.normed + (size_t)m * K + k) = my_x[r][c][j];
                }
            }
        }
    }

    int buffer = 0, depth = 0;
    const int m = threadIdx.x / HEIGHT, i = threadIdx.x % HEIGHT;  // a thread finishes row i of a tile for row m of x
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, buffer ^= 1) {
        float sums[NT][4];
#pragma unroll
        for (int c = 0; c < NT; c++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[c][i] = 0;
        const int n = tile * HEIGHT + i;
        const Finish end = prepare(e, m, n, M, N);
#pragma unroll
        for (int r = 0; r < SLOTS; r++) {
            wait_copies<DEPTH * SLOTS - 1>();
            const uint4* here = ring + (depth * SLOTS + r) * 2 * THREADS;
            const uint4 upper = here[0], lower = here[THREADS];
            const u32 w[4] = {upper.x, upper.y, upper.z, upper.w}, v[4] = {lower.x, lower.y, lower.z, lower.w};
#pragma unroll
            for (int j = 0; j < CHUNK / 8; j++) {  // 8 weights of either row
                u32 p[4], q[4];
                if (BITS == 8) {
                    widen8(w[2 * j], p);
                    widen8(w[2 * j + 1], p + 2);
                    widen8(v[2 * j], q);
                    widen8(v[2 * j + 1], q + 2);
                } else {
                    widen4(w[j], p);
                    widen4(v[j], q);
                }
#pragma unroll
                for (int c = 0; c < NT; c++) {
                    const uint4 b = my_x[r][c][j];
                    multiply(sums[c], p[0], q[0], p[1], q[1], b.x, b.y);
                    multiply(sums[c], p[2], q[2], p[3], q[3], b.z, b.w);
                }
            }
            fetch(tile + DEPTH * gridDim.x, r, depth);
        }
        if (DEPTH > 1) depth = depth == DEPTH - 1 ? 0 : depth + 1;
        float* parts = all_parts + buffer * WARPS * MT * PITCH;
#pragma unroll
        for (int c = 0; c < NT; c++)
#pragma unroll
            for (int i = 0; i < 4; i++) parts[(warp * MT + c * 8 + 2 * t + i % 2) * PITCH + i / 2 * 8 + g] = sums[c][i];
        __syncthreads();
        if (m < M && n < N) {
            float sum = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += parts[(w * MT + m) * PITCH + i];
            finish(e, end, sum, m, n, N);
        }
    }
    wait_copies<0>();
}
#define FEW_ROWS(BITS, MT)                                                                                          \
    extern "C" __global__ void __launch_bounds__(512, 1)                                                            \
        few_rows(const unsigned char* weight, const u16* x, const u16* scale, const u16* bias, const u16* residual, \
                 float alpha, int use_gelu, u16* y, const u16* norm_weight, const u16* norm_bias, u16* normed,      \
                 float epsilon, int M, int N, int K) {                                                              \
        const Epilogue e = {scale, bias, residual, alpha, use_gelu, y};                                             \
        const Norm norm = {norm_weight, norm_bias, normed, epsilon};                                                \
        few_rows<BITS, MT>(weight, x, norm, e, M, N, K);                                                            \
    }
