// y = epilogue(x * weight^T) of 2 to 32 rows x [M, K] on Hopper. Module: linear_small_m_BITS_TILE_M_SPLIT_K.
//
// Shapes: quantised weight [N, K]; M <= TILE_M; K has a step of 128 for each of SPLIT_K blocks. Output tile: TILE_M x
//   128.
// Grid: SPLIT_K blocks (a cluster) a tile; block: 320, two to a multiprocessor.
// Shared memory: `stages` of x and weights; SPLIT_K > 1: sums of the other blocks. Aligned to 1024 bytes here.
// Tensor maps: bytes, swizzled. Boxes: x TILE_M rows of 128 bytes, two a step; weight 128 rows of 128 bytes (INT4:
//   64).
// Pipeline: a producer warp (TMA) for weights, another for x, up to `stages` steps ahead; eight consumer warps of 16
//   columns of y each (mma). The order of K is free in a product: a thread takes 16 contiguous columns of weight and
//   x.
// Split-K: each block of the cluster reduces and finishes the columns of some of its warps.
#pragma once

#include "kernels/cuda/dequantize.cuh"
#include "kernels/cuda/hopper/pipeline.cuh"
#include "kernels/cuda/mma.cuh"

static_assert((BITS == 8 || BITS == 4) && (TILE_M == 8 || TILE_M == 16 || TILE_M == 32), "");

struct LinearSmallM {
    TensorMap weight, x;
    Epilogue epilogue;
    int M, N, K, stages;
};

struct SmallM {
    static constexpr int STEP = 128, ROW_BYTES = 16 * BITS, BOX_BYTES = TILE_M * 128;  // 64 columns of x
    static constexpr int X_BYTES = 2 * BOX_BYTES, STAGE = X_BYTES + TILE_N * ROW_BYTES;
    static constexpr int M_FRAGMENTS = TILE_M / 8,
                         OWN_WARPS = (CONSUMERS + SPLIT_K - 1) / SPLIT_K;  // finished by a block
    static constexpr int LAUNCH_AHEAD = 4;  // steps from the last load back to pdl_launch_dependents
    static constexpr int L2_AHEAD = 2;      // steps beyond the ring to prefetch to L2
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;

    // With registers to spare, a thread loads a whole step at once, and the halves of its columns have their own sums.
    static constexpr bool AT_ONCE = TILE_M <= 16;
    static constexpr int SUMS = AT_ONCE ? 2 : 1;
    // Offsets in a stage of the thread's 16 columns of each half: row g of the weight; x, in two pieces.
    u32 weight_at[2], x_at[2][2];

    __device__ __forceinline__ SmallM() {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            // Free of bank conflicts: eight threads that read together use different banks.
            const int sixteen = BITS == 8 ? 2 * t + (half ^ t / 2) : t + (half ? 2 : t / 2 * 4);
            weight_at[half] = X_BYTES + (warp * 16 + g) * ROW_BYTES +
                              (BITS == 8 ? (sixteen ^ g) * 16 : (sixteen / 2 ^ g / 2) * 16 + sixteen % 2 * 8);
            for (int i = 0; i < 2; i++)
                x_at[half][i] = sixteen / 4 * BOX_BYTES + g * 128 + ((sixteen % 4 * 2 + i) ^ g) * 16;
            // Kept in registers, not recomputed at every step.
            asm volatile("" : "+r"(weight_at[half]), "+r"(x_at[half][0]), "+r"(x_at[half][1]));
        }
    }

    // sums += the products of a step, laid out as in mma.cuh.
    __device__ __forceinline__ void multiply_step(u32 stage, float (&sums)[SUMS][M_FRAGMENTS][4]) const {
        uint4 w[2][2], x[2][M_FRAGMENTS][2];  // INT4 uses half of w
        auto load = [&](int half) {
#pragma unroll
            for (int r = 0; r < 2; r++) {  // rows g, g + 8
                const u32 at = stage + weight_at[half] + r * 8 * ROW_BYTES;
                if (BITS == 8) {
                    w[half][r] = ld_shared_v4(at);
                } else {
                    const uint2 v = ld_shared_v2(at);
                    w[half][r].x = v.x;
                    w[half][r].y = v.y;
                }
            }
#pragma unroll
            for (int i = 0; i < M_FRAGMENTS; i++)
#pragma unroll
                for (int j = 0; j < 2; j++) x[half][i][j] = ld_shared_v4(stage + x_at[half][j] + i * 8 * 128);
        };
        auto multiply_half = [&](int half) {
            u32 w_pairs[2][8];  // pairs
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const uint4 v = w[half][r];
                if (BITS == 8) {
                    dequantize_int8(v.x, w_pairs[r]);
                    dequantize_int8(v.y, w_pairs[r] + 2);
                    dequantize_int8(v.z, w_pairs[r] + 4);
                    dequantize_int8(v.w, w_pairs[r] + 6);
                } else {
                    dequantize_int4(v.x, w_pairs[r]);
                    dequantize_int4(v.y, w_pairs[r] + 4);
                }
            }
#pragma unroll
            for (int j = 0; j < 8; j += 2)
#pragma unroll
                for (int i = 0; i < M_FRAGMENTS; i++) {  // inner loop: products of the same sums wait for each other
                    const uint4 v = x[half][i][j / 4];
                    mma_m16n8k16(sums[half % SUMS][i], w_pairs[0][j], w_pairs[1][j], w_pairs[0][j + 1],
                                 w_pairs[1][j + 1], j % 4 ? v.z : v.x, j % 4 ? v.w : v.y);
                }
        };
        load(0);
        if (AT_ONCE) load(1);
        multiply_half(0);
        if (!AT_ONCE) load(1);
        multiply_half(1);
    }

    __device__ __forceinline__ void run(const LinearSmallM& a) {
        extern __shared__ uint4 shared[];
        __shared__ unsigned long long barriers[2 * MAX_STAGES];
        const int part = blockIdx.x % SPLIT_K;
        const int first_n = blockIdx.x / SPLIT_K * TILE_N;
        const int steps = (a.K + STEP - 1) / STEP, begin = steps * part / SPLIT_K, end = steps * (part + 1) / SPLIT_K;
        u32 ring = (smem_address(shared) + 1023) / 1024 * 1024, full = smem_address(barriers);
        asm volatile("" : "+r"(ring), "+r"(full));  // kept in registers
        const u32 empty = full + 8 * MAX_STAGES, received = ring + a.stages * STAGE;
        init_barriers(full, empty, a.stages);
        if (SPLIT_K > 1) cluster_arrive();  // st_cluster_v4 needs all blocks running

        float all_sums[SUMS][M_FRAGMENTS][4] = {}, (&sums)[M_FRAGMENTS][4] = all_sums[0];
        const int owner = warp / OWN_WARPS, n = first_n + warp * 16 + g, m = t * 2;
        const bool finishes = owner == part && warp < CONSUMERS;
        u32 scale_bias[2], residual[M_FRAGMENTS][2];  // pairs: of rows g and g + 8; of two rows of x
        u32 parity = warp >= CONSUMERS;               // producers find the first stages empty
        int stage = 0;
        auto advance = [&] {
            if (++stage == a.stages) {
                stage = 0;
                parity ^= 1;
            }
        };
        if (warp >= CONSUMERS) {
            const bool weights = warp == CONSUMERS;  // else x, a result of the kernel before
            const TensorMap& map = weights ? a.weight : a.x;
            const int bytes = weights ? STAGE - X_BYTES : X_BYTES, step_bytes = weights ? ROW_BYTES : 256;
            asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
            if (!weights) pdl_wait();
#pragma unroll 1
            for (int step = begin; step < end && lane == 0; step++, advance()) {
                const u32 barrier = full + stage * 8;
                // The ring is full, maybe long before x is ready.
                if (weights && step == begin + a.stages)
#pragma unroll 1
                    for (int i = step; i < min(step + L2_AHEAD, end); i++) tma_prefetch(map, i * step_bytes, first_n);
                mbarrier_wait(empty + stage * 8, parity);
                mbarrier_arrive_expect_tx(barrier, bytes);
                tma_load(ring + stage * STAGE + weights * X_BYTES, map, step * step_bytes, weights * first_n, barrier);
                if (!weights) tma_load(ring + stage * STAGE + BOX_BYTES, map, step * step_bytes + 128, 0, barrier);
                // Not earlier: blocks of the next kernel load weights as soon as they start.
                if (weights && step == max(end - 1 - LAUNCH_AHEAD, begin)) pdl_launch_dependents();
            }
            __syncwarp();
        } else {
            pdl_wait();
            if (finishes)  // operands of the epilogue
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const int row = n + r * 8;
                    scale_bias[r] = 0;
                    if (row < a.N) scale_bias[r] = a.epilogue.scale[row];
                    if (row < a.N && a.epilogue.bias) scale_bias[r] |= (u32)a.epilogue.bias[row] << 16;
#pragma unroll
                    for (int i = 0; i < M_FRAGMENTS; i++) {
                        const int token = m + i * 8;
                        const u16* from = a.epilogue.residual + (size_t)token * a.N + row;
                        residual[i][r] = 0;
                        if (a.epilogue.residual && row < a.N && token < a.M) residual[i][r] = from[0];
                        if (a.epilogue.residual && row < a.N && token + 1 < a.M) residual[i][r] |= (u32)from[a.N] << 16;
                    }
                }
            for (int step = begin; step < end; step++, advance()) {
                mbarrier_wait(full + stage * 8, parity);
                multiply_step(ring + stage * STAGE, all_sums);
                __syncwarp();
                if (lane == 0) mbarrier_arrive(empty + stage * 8);
            }
        }

#pragma unroll
        for (int i = 0; i < M_FRAGMENTS * 4 && AT_ONCE; i++) sums[i / 4][i % 4] += all_sums[SUMS - 1][i / 4][i % 4];
        if (SPLIT_K > 1) {
            auto place = [&](int block, int i) {  // of the sums a block sends to a warp
                return received + (((block * OWN_WARPS + warp % OWN_WARPS) * M_FRAGMENTS + i) * 32 + lane) * 16;
            };
            cluster_wait();
            if (warp < CONSUMERS && !finishes)
#pragma unroll
                for (int i = 0; i < M_FRAGMENTS; i++) st_cluster_v4(place(part, i), owner, sums[i]);
            cluster_arrive();
            cluster_wait();
#pragma unroll
            for (int block = 0; block < SPLIT_K; block++)
                if (block != part && finishes)
#pragma unroll
                    for (int i = 0; i < M_FRAGMENTS; i++) {
                        const uint4 v = ld_shared_v4(place(block, i));
                        sums[i][0] += __uint_as_float(v.x);
                        sums[i][1] += __uint_as_float(v.y);
                        sums[i][2] += __uint_as_float(v.z);
                        sums[i][3] += __uint_as_float(v.w);
                    }
        }
        if (!finishes) return;
        const Epilogue e = a.epilogue;
#pragma unroll
        for (int i = 0; i < M_FRAGMENTS; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int r = j / 2, token = m + i * 8 + j % 2, row = n + r * 8;
                const u32 both = scale_bias[r], pair = residual[i][r];
                const EpilogueOperands f = {(u16)both, (u16)(both >> 16), (u16)(pair >> j % 2 * 16)};
                if (token < a.M && row < a.N) store_output(e, f, sums[i][j], token, row, a.N);
            }
    }
};

extern "C" __global__ void __cluster_dims__(SPLIT_K, 1, 1) __launch_bounds__(320, 2)
    linear_small_m(const __grid_constant__ LinearSmallM a) {
    SmallM().run(a);
}
