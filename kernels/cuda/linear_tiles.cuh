// A linear of many rows of x: a block owns 64 * HEIGHT weight rows (blockIdx.x), MT rows of x (blockIdx.z), and a part
// of K (blockIdx.y). Weights and x come through shared memory, STAGES - 1 steps ahead; each thread widens the weights
// that it copied itself, once for all MT rows. With several parts of K, the block that comes last adds them up, in
// their order. Block: 128; weight, its rows and x aligned to 16 bytes.
#pragma once

#include "kernels/cuda/dequantize.cuh"
#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/mma.cuh"

template <int BITS, int MT, int HEIGHT, int STAGES>
__device__ __forceinline__ void tiles(const unsigned char* __restrict__ weight, const u16* x, const Epilogue& e,
                                      float* parts, u32* tickets, int M, int N, int K) {
    constexpr int CHUNK = 128 / BITS, HALF = 4 * CHUNK, STEP = 2 * HALF, NT = MT / 8, STRIDE = (STEP + 8) / 8;
    constexpr int THREADS = 128, WEIGHTS = 4 * HEIGHT * THREADS, STAGE = WEIGHTS + MT * STRIDE;  // in 16 bytes
    extern __shared__ uint4 shared[];
    __shared__ bool is_last;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const size_t row_bytes = (size_t)K * BITS / 8;
    const int row = (blockIdx.x * 4 + warp) * 16 * HEIGHT + g, column = blockIdx.z * MT;
    const int all_steps = (K + STEP - 1) / STEP, per_part = (all_steps + gridDim.y - 1) / gridDim.y;
    const int begin = blockIdx.y * per_part, end = min(begin + per_part, all_steps);

    // A step is 128 bytes of each row, in two halves; the thread has 16 bytes of each, in 2 · HEIGHT rows.
    const unsigned char* my_weight = weight + row * row_bytes + t * 16;
    auto copy_weights = [&](int step, int slot) {
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int h = 0; h < 2 * HEIGHT; h++) {
                const int k = step * STEP + i * HALF + t * CHUNK;
                const bool inside = step < end && k < K && row + h * 8 < N;
                copy_async(&shared[slot * STAGE + (i * 2 * HEIGHT + h) * THREADS + threadIdx.x],
                           inside ? my_weight + h * 8 * row_bytes + step * 128 + i * 64 : weight, inside);
            }
    };
    auto copy_x = [&](int step, int slot) {
#pragma unroll
        for (int i = threadIdx.x; i < MT * STEP / 8; i += THREADS) {
            const int m = i / (STEP / 8), c = i % (STEP / 8), k = step * STEP + c * 8;
            const bool inside = step < end && column + m < M && k < K;
            copy_async(&shared[slot * STAGE + WEIGHTS + m * STRIDE + c], inside ? x + (size_t)(column + m) * K + k : x,
                       inside);
        }
        commit();
    };

    start_next();
    for (int s = 0; s < STAGES - 1; s++) copy_weights(begin + s, s);
    wait();
    for (int s = 0; s < STAGES - 1; s++) copy_x(begin + s, s);  // the first group has all the weights, too

    float sums[HEIGHT][NT][4];
#pragma unroll
    for (int h = 0; h < HEIGHT; h++)
#pragma unroll
        for (int c = 0; c < NT; c++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[h][c][i] = 0;

    int slot = 0;
    for (int step = begin; step < end; step++) {
        wait_copies<STAGES - 2>();
        __syncthreads();
        const int free = slot == 0 ? STAGES - 1 : slot - 1;
        copy_weights(step + STAGES - 1, free);
        copy_x(step + STAGES - 1, free);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint4* here = shared + slot * STAGE + half * 2 * HEIGHT * THREADS;
            const uint4* xs = shared + slot * STAGE + WEIGHTS + g * STRIDE + (half * HALF + t * CHUNK) / 8;
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
                    if (BITS == 8) {
                        widen8(words[h][2 * j], a[h]);
                        widen8(words[h][2 * j + 1], a[h] + 2);
                    } else
                        widen4(words[h][j], a[h]);
                }
#pragma unroll
                for (int c = 0; c < NT; c++) {
                    const uint4 b = xs[c * 8 * STRIDE + j];
#pragma unroll
                    for (int h = 0; h < HEIGHT; h++) {
                        u32(&p)[4] = a[2 * h], (&q)[4] = a[2 * h + 1];
                        multiply(sums[h][c], p[0], q[0], p[1], q[1], b.x, b.y);
                        multiply(sums[h][c], p[2], q[2], p[3], q[3], b.z, b.w);
                    }
                }
            }
        }
        slot = slot == STAGES - 1 ? 0 : slot + 1;
    }

    // The sums leave the registers, for memory if other parts are to be added, and are finished by a loop.
    constexpr int COUNT = HEIGHT * NT * 4;
    const size_t tile = (size_t)blockIdx.z * gridDim.x + blockIdx.x;
    wait_copies<0>();
    __syncthreads();
    float* kept = (gridDim.y > 1 ? parts + tile * gridDim.y * COUNT * THREADS : (float*)shared) + threadIdx.x;
#pragma unroll
    for (int h = 0; h < HEIGHT; h++)
#pragma unroll
        for (int c = 0; c < NT; c++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                kept[((size_t)blockIdx.y * COUNT + (h * NT + c) * 4 + i) * THREADS] = sums[h][c][i];
    if (gridDim.y > 1) {
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            is_last = atomicAdd(&tickets[tile], 1) == gridDim.y - 1;
            if (is_last) tickets[tile] = 0;  // for the next launch
        }
        __syncthreads();
        if (!is_last) return;
        __threadfence();
    }
    const int count = gridDim.y;
#pragma unroll 1
    for (int c = 0; c < NT; c++) {
        float total[HEIGHT][4];
        Finish ends[HEIGHT][4];
#pragma unroll
        for (int h = 0; h < HEIGHT; h++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                total[h][i] = 0;
                ends[h][i] = prepare(e, column + c * 8 + 2 * t + i % 2, row + h * 16 + i / 2 * 8, M, N);
            }
        const float* from = kept + c * 4 * THREADS;
#pragma unroll 4
        for (int part = 0; part < count; part++, from += COUNT * THREADS)
#pragma unroll
            for (int h = 0; h < HEIGHT; h++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float* at = from + (h * NT * 4 + i) * THREADS;
                    total[h][i] += count > 1 ? __ldcg(at) : *at;
                }
#pragma unroll
        for (int h = 0; h < HEIGHT; h++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int n = row + h * 16 + i / 2 * 8, m = column + c * 8 + 2 * t + i % 2;
                if (n < N && m < M) finish(e, ends[h][i], total[h][i], m, n, N);
            }
    }
}
#define TILES(NAME, BITS, MT, HEIGHT, STAGES, BLOCKS)                                                           \
    extern "C" __global__ void __launch_bounds__(128, BLOCKS)                                                   \
        NAME(const unsigned char* weight, const u16* x, const u16* scale, const u16* bias, const u16* residual, \
             float alpha, int use_gelu, u16* y, float* parts, u32* tickets, int M, int N, int K) {              \
        const Epilogue e = {scale, bias, residual, alpha, use_gelu, y};                                         \
        tiles<BITS, MT, HEIGHT, STAGES>(weight, x, e, parts, tickets, M, N, K);                                 \
    }
