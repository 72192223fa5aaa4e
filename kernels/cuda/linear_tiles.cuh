// y = epilogue(x * weight^T) of many rows x [M, K]. Module: linear_tiles_BITS_TILE_M.
//
// Shapes: quantised weight [N, K]; a block has 64 * HEIGHT weight rows, TILE_M rows of x and a part of K.
// Grid: (tiles of N, parts of K, tiles of M); block: 128, BLOCKS_PER_SM to a multiprocessor. Alignment: weight, its
//   rows and x to 16 bytes.
// Shared memory: STAGES of weights and x; after the products, their sums.
// Pipeline: cp.async runs STAGES - 1 steps ahead. Each thread dequantises the weights it copied itself, once for all
//   rows of x.
// Split-K: the last block of a tile to arrive adds all parts, in their order. arrivals: zeros [tiles], left as zeros.
//   Source: threadFenceReduction of the CUDA samples.
#pragma once

#include "kernels/cuda/dequantize.cuh"
#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/mma.cuh"

static_assert((BITS == 8 || BITS == 4) && TILE_M % 8 == 0 && STAGES >= 2, "");
constexpr int THREADS = 128, M_FRAGMENTS = TILE_M / 8;
constexpr int CHUNK = 128 / BITS, HALF = 4 * CHUNK, STEP = 2 * HALF;              // weights in 16, 64 and 128 bytes
constexpr int STRIDE = (STEP + 8) / 8;                                            // of rows of x, in 16 bytes; padded
constexpr int WEIGHTS = 4 * HEIGHT * THREADS, STAGE = WEIGHTS + TILE_M * STRIDE;  // in 16 bytes

struct LinearTiles {
    const unsigned char* weight;
    const u16* x;
    Epilogue epilogue;
    float* partials;  // [tiles, parts, TILE_M * 64 * HEIGHT], if K is split
    u32* arrivals;
    int M, N, K;
};

extern "C" __global__ void __launch_bounds__(128, BLOCKS_PER_SM) linear_tiles(const LinearTiles a) {
    const unsigned char* const weight = a.weight;
    const u16* const x = a.x;
    const Epilogue epilogue = a.epilogue;
    float* const partials = a.partials;
    u32* const arrivals = a.arrivals;
    const int M = a.M, N = a.N, K = a.K;
    extern __shared__ uint4 shared[];
    __shared__ bool is_last;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const size_t row_bytes = (size_t)K * BITS / 8;
    const int row = (blockIdx.x * 4 + warp) * 16 * HEIGHT + g, column = blockIdx.z * TILE_M;
    const int all_steps = (K + STEP - 1) / STEP, per_part = (all_steps + gridDim.y - 1) / gridDim.y;
    const int begin = blockIdx.y * per_part, end = min(begin + per_part, all_steps);

    // A step is 128 bytes of each row, in two halves. A thread has 16 bytes of each, in 2 * HEIGHT rows.
    const unsigned char* my_weight = weight + row * row_bytes + t * 16;
    auto copy_weights = [&](int step, int stage) {
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int h = 0; h < 2 * HEIGHT; h++) {
                const int k = step * STEP + i * HALF + t * CHUNK;
                const bool inside = step < end && k < K && row + h * 8 < N;
                cp_async(&shared[stage * STAGE + (i * 2 * HEIGHT + h) * THREADS + threadIdx.x],
                         inside ? my_weight + h * 8 * row_bytes + step * 128 + i * 64 : weight, inside);
            }
    };
    auto copy_x = [&](int step, int stage) {
#pragma unroll
        for (int i = threadIdx.x; i < TILE_M * STEP / 8; i += THREADS) {
            const int m = i / (STEP / 8), c = i % (STEP / 8), k = step * STEP + c * 8;
            const bool inside = step < end && column + m < M && k < K;
            cp_async(&shared[stage * STAGE + WEIGHTS + m * STRIDE + c], inside ? x + (size_t)(column + m) * K + k : x,
                     inside);
        }
        cp_async_commit();
    };

    pdl_launch_dependents();
    for (int s = 0; s < STAGES - 1; s++) copy_weights(begin + s, s);
    pdl_wait();
    for (int s = 0; s < STAGES - 1; s++) copy_x(begin + s, s);  // the first group includes all weights

    float sums[HEIGHT][M_FRAGMENTS][4];
#pragma unroll
    for (int h = 0; h < HEIGHT; h++)
#pragma unroll
        for (int c = 0; c < M_FRAGMENTS; c++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[h][c][i] = 0;

    int stage = 0;
    for (int step = begin; step < end; step++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        const int next = stage == 0 ? STAGES - 1 : stage - 1;
        copy_weights(step + STAGES - 1, next);
        copy_x(step + STAGES - 1, next);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint4* here = shared + stage * STAGE + half * 2 * HEIGHT * THREADS;
            const uint4* xs = shared + stage * STAGE + WEIGHTS + g * STRIDE + (half * HALF + t * CHUNK) / 8;
            u32 words[2 * HEIGHT][4];
#pragma unroll
            for (int h = 0; h < 2 * HEIGHT; h++) {
                const uint4 w = here[h * THREADS + threadIdx.x];
                words[h][0] = w.x;
                words[h][1] = w.y;
                words[h][2] = w.z;
                words[h][3] = w.w;
            }
#pragma unroll
            for (int j = 0; j < CHUNK / 8; j++) {  // 8 weights of every row
                u32 a[2 * HEIGHT][4];
#pragma unroll
                for (int h = 0; h < 2 * HEIGHT; h++) {
                    dequantize8<BITS>(words[h], j, a[h]);
                }
#pragma unroll
                for (int c = 0; c < M_FRAGMENTS; c++) {
                    const uint4 b = xs[c * 8 * STRIDE + j];
#pragma unroll
                    for (int h = 0; h < HEIGHT; h++) {
                        u32(&p)[4] = a[2 * h], (&q)[4] = a[2 * h + 1];
                        mma_m16n8k16(sums[h][c], p[0], q[0], p[1], q[1], b.x, b.y);
                        mma_m16n8k16(sums[h][c], p[2], q[2], p[3], q[3], b.z, b.w);
                    }
                }
            }
        }
        stage = stage == STAGES - 1 ? 0 : stage + 1;
    }

    // The epilogue is a loop, so the sums leave the registers: for global memory if K is split, else for shared memory.
    constexpr int COUNT = HEIGHT * M_FRAGMENTS * 4;
    const size_t tile = (size_t)blockIdx.z * gridDim.x + blockIdx.x;
    cp_async_wait<0>();
    __syncthreads();
    float* kept = (gridDim.y > 1 ? partials + tile * gridDim.y * COUNT * THREADS : (float*)shared) + threadIdx.x;
#pragma unroll
    for (int h = 0; h < HEIGHT; h++)
#pragma unroll
        for (int c = 0; c < M_FRAGMENTS; c++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                kept[((size_t)blockIdx.y * COUNT + (h * M_FRAGMENTS + c) * 4 + i) * THREADS] = sums[h][c][i];
    if (gridDim.y > 1) {
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            is_last = atomicAdd(&arrivals[tile], 1) == gridDim.y - 1;
            if (is_last) arrivals[tile] = 0;  // for the next launch
        }
        __syncthreads();
        if (!is_last) return;
        __threadfence();
    }
    const int count = gridDim.y;
#pragma unroll 1
    for (int c = 0; c < M_FRAGMENTS; c++) {
        float total[HEIGHT][4];
        EpilogueOperands operands[HEIGHT][4];
#pragma unroll
        for (int h = 0; h < HEIGHT; h++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                total[h][i] = 0;
                operands[h][i] =
                    load_operands(epilogue, column + c * 8 + 2 * t + i % 2, row + h * 16 + i / 2 * 8, M, N);
            }
        const float* from = kept + c * 4 * THREADS;
#pragma unroll 4
        for (int part = 0; part < count; part++, from += COUNT * THREADS)
#pragma unroll
            for (int h = 0; h < HEIGHT; h++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float* at = from + (h * M_FRAGMENTS * 4 + i) * THREADS;
                    total[h][i] += count > 1 ? __ldcg(at) : *at;
                }
#pragma unroll
        for (int h = 0; h < HEIGHT; h++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int n = row + h * 16 + i / 2 * 8, m = column + c * 8 + 2 * t + i % 2;
                if (n < N && m < M) store_output(epilogue, operands[h][i], total[h][i], m, n, N);
            }
    }
}
