// y = epilogue(LayerNorm(x) * weight^T) of 2 to 16 rows x [M, K]; the LayerNorm if norm_weight is given. Module:
// linear_m16_BITS_TILE_M. From sm_80 on.
//
// Shapes: quantised weight [N, K]; M <= TILE_M, K <= MAX_K.
// Grid: any; block: 512, one to a multiprocessor. Alignment: weight, its rows and x to 16 bytes.
// Shared memory: the ring (64 KB), two buffers of partial sums.
// Pipeline: a block owns 16 weight rows at a time, each of its 16 warps 1/16 of K, for which it holds x in registers.
//   Each thread reads only the weights it copied itself (cp.async), so warps meet once a tile, to add their partial
//   sums.
#pragma once

#include "kernels/cuda/dequantize.cuh"
#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/layer_norm.cuh"
#include "kernels/cuda/mma.cuh"

static_assert((BITS == 8 || BITS == 4) && (TILE_M == 8 || TILE_M == 16), "");
constexpr int MAX_K = 4096;                                  // cuda_plans.M16_MAX_K
constexpr int WARPS = 16, THREADS = 512, TILE_N = 16;        // a thread an output
constexpr int SLICES = MAX_K * BITS / 8 / WARPS / 64;        // of 64 bytes of a weight row, for each warp
constexpr int STAGES = 4 / SLICES;                           // tiles in flight
constexpr int CHUNK = 128 / BITS, M_FRAGMENTS = TILE_M / 8;  // weights in 16 bytes
constexpr int PITCH = TILE_N + 4;                            // of partial sums: free of bank conflicts
static_assert(TILE_M * TILE_N <= THREADS && STAGES * SLICES == 4, "");

struct LinearM16 {
    const unsigned char* weight;
    const u16* x;
    Epilogue epilogue;
    Norm norm;
    int M, N, K;
};

extern "C" __global__ void __launch_bounds__(512, 1) linear_m16(const LinearM16 a) {
    const unsigned char* const weight = a.weight;
    const u16* const x = a.x;
    const Epilogue epilogue = a.epilogue;
    const Norm norm = a.norm;
    const int M = a.M, N = a.N, K = a.K;
    extern __shared__ uint4 shared[];
    float* const all_partials = (float*)(shared + 4 * 2 * THREADS);  // [2][WARPS][TILE_M * PITCH]
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int tiles = (N + TILE_N - 1) / TILE_N;
    const int row_bytes = K * BITS / 8, my_byte = warp * 64 + t * 16;
    uint4* ring = shared + threadIdx.x;  // of this thread: every 512th 16 bytes

    auto fetch = [&](int tile, int slice, int stage) {
        const int byte = my_byte + slice * WARPS * 64, n = tile * TILE_N + g;
        const unsigned char* from = weight + (size_t)n * row_bytes + byte;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const bool inside = byte < row_bytes && n + h * 8 < N;
            cp_async(ring + ((stage * SLICES + slice) * 2 + h) * THREADS,
                     inside ? from + h * 8 * (size_t)row_bytes : weight, inside);
        }
        cp_async_commit();
    };
    pdl_launch_dependents();
#pragma unroll
    for (int d = 0; d < STAGES; d++)
#pragma unroll
        for (int r = 0; r < SLICES; r++) fetch(blockIdx.x + d * gridDim.x, r, d);
    pdl_wait();
    uint4 my_x[SLICES][M_FRAGMENTS][CHUNK / 8];
#pragma unroll
    for (int r = 0; r < SLICES; r++)
#pragma unroll
        for (int c = 0; c < M_FRAGMENTS; c++)
#pragma unroll
            for (int j = 0; j < CHUNK / 8; j++) {
                const int m = c * 8 + g, k = (my_byte + r * WARPS * 64) * 8 / BITS + j * 8;
                my_x[r][c][j] = m < M && k < K ? __ldcg((const uint4*)(x + (size_t)m * K + k)) : make_uint4(0, 0, 0, 0);
            }

    if (norm.norm_weight) {                             // as layer_norm_row
        float mean[M_FRAGMENTS], inverse[M_FRAGMENTS];  // of the standard deviation
#pragma unroll
        for (int c = 0; c < M_FRAGMENTS; c++) mean[c] = 0;
        // Reduces every row of x over the block: its mean, then its variance.
        auto sum_rows = [&](float* partials, float (&totals)[M_FRAGMENTS], bool squares) {
#pragma unroll
            for (int c = 0; c < M_FRAGMENTS; c++) {
                float sum = 0;
#pragma unroll
                for (int r = 0; r < SLICES; r++) {
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
                if (t == 0) partials[warp * TILE_M + c * 8 + g] = sum;
            }
            __syncthreads();
#pragma unroll
            for (int c = 0; c < M_FRAGMENTS; c++) {
                float total = 0;
#pragma unroll
                for (int w = 0; w < WARPS; w++) total += partials[w * TILE_M + c * 8 + g];
                totals[c] = total / K;
            }
        };
        float* const partials = all_partials + WARPS * TILE_M * PITCH;  // buffer 1: the first tile uses buffer 0
        sum_rows(partials, mean, false);
        sum_rows(partials + WARPS * TILE_M, inverse, true);
#pragma unroll
        for (int c = 0; c < M_FRAGMENTS; c++) inverse[c] = rsqrtf(inverse[c] + norm.epsilon);
#pragma unroll
        for (int r = 0; r < SLICES; r++) {
#pragma unroll
            for (int j = 0; j < CHUNK / 8; j++) {
                const int k = (my_byte + r * WARPS * 64) * 8 / BITS + j * 8;
                if (k >= K) continue;
                const uint4 w = *(const uint4*)(norm.norm_weight + k), b = *(const uint4*)(norm.norm_bias + k);
#pragma unroll
                for (int c = 0; c < M_FRAGMENTS; c++) {
                    my_x[r][c][j] = layer_norm8(my_x[r][c][j], mean[c], inverse[c], w, b);
                    const int m = c * 8 + g;
                    if (blockIdx.x == 0 && m < M) *(uint4*)(norm.normed + (size_t)m * K + k) = my_x[r][c][j];
                }
            }
        }
    }

    int buffer = 0, stage = 0;
    const int m = threadIdx.x / TILE_N, i = threadIdx.x % TILE_N;  // the output that the thread finishes
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, buffer ^= 1) {
        float sums[M_FRAGMENTS][4];
#pragma unroll
        for (int c = 0; c < M_FRAGMENTS; c++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[c][i] = 0;
        const int n = tile * TILE_N + i;
        const EpilogueOperands operands = load_operands(epilogue, m, n, M, N);
#pragma unroll
        for (int r = 0; r < SLICES; r++) {
            cp_async_wait<STAGES * SLICES - 1>();
            const uint4* here = ring + (stage * SLICES + r) * 2 * THREADS;
            const uint4 upper = here[0], lower = here[THREADS];
            const u32 w[4] = {upper.x, upper.y, upper.z, upper.w}, v[4] = {lower.x, lower.y, lower.z, lower.w};
#pragma unroll
            for (int j = 0; j < CHUNK / 8; j++) {  // 8 weights of both rows
                u32 p[4], q[4];
                dequantize8<BITS>(w, j, p);
                dequantize8<BITS>(v, j, q);
#pragma unroll
                for (int c = 0; c < M_FRAGMENTS; c++) {
                    const uint4 b = my_x[r][c][j];
                    mma_m16n8k16(sums[c], p[0], q[0], p[1], q[1], b.x, b.y);
                    mma_m16n8k16(sums[c], p[2], q[2], p[3], q[3], b.z, b.w);
                }
            }
            fetch(tile + STAGES * gridDim.x, r, stage);
        }
        if (STAGES > 1) stage = stage == STAGES - 1 ? 0 : stage + 1;
        float* partials = all_partials + buffer * WARPS * TILE_M * PITCH;
#pragma unroll
        for (int c = 0; c < M_FRAGMENTS; c++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                partials[(warp * TILE_M + c * 8 + 2 * t + i % 2) * PITCH + i / 2 * 8 + g] = sums[c][i];
        __syncthreads();
        if (m < M && n < N) {
            float sum = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += partials[(w * TILE_M + m) * PITCH + i];
            store_output(epilogue, operands, sum, m, n, N);
        }
    }
    cp_async_wait<0>();
}
