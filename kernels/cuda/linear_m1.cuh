// A linear of one row of x. A block of 8 warps, two to a multiprocessor, owns 16 weight rows at a time, each warp every
// eighth 64 bytes of them. RING copies of 16 bytes to shared memory are under way for each thread and row at any time,
// from before the kernel's turn (weights depend on nothing) to its end, over the boundaries of tiles. A thread reads
// what it has copied itself. x is in shared memory, too; the sums of the 16 rows come from the tensor cores, whose 8
// columns are all alike then. More copies under way would delay what the blocks tell each other from kernel to kernel.
// Grid: any; block: 256; weight, its rows and x aligned to 16 bytes.
#pragma once

#include "kernels/cuda/dequantize.cuh"
#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/layer_norm.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/operation.cuh"

#define WARPS 8
#if __CUDA_ARCH__ >= 800
#define RING 4
#else
#define RING 2
#endif
#define TURN (RING * WARPS * 64)  // bytes of a row that a block has under way

struct Ring {
    uint4* place;            // this thread's, in shared memory; every 256th is its own
    const unsigned char* p;  // where this thread's bytes of a turn begin, in row g
    size_t stride;           // from there to row g + 8
    int left, rows_left;     // bytes of the row, and rows, from there on
    __device__ __forceinline__ void point_at(const Operation& op, int tile, int turn) {
        const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
        const int row_bytes = op.K * op.bits / 8, byte = turn * TURN + warp * 64 + t * 16, n = tile * 16 + g;
        p = op.weight + (size_t)n * row_bytes + byte;
        stride = 8 * (size_t)row_bytes;
        left = row_bytes - byte;
        rows_left = op.N - n;
    }
    __device__ __forceinline__ void fetch(int r) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const bool inside = r * WARPS * 64 < left && h * 8 < rows_left;
            copy_async(place + (r * 2 + h) * 256, inside ? p + h * stride + r * WARPS * 64 : p, inside);
        }
        commit();
    }
};

// y = LayerNorm(x) . weight, with what follows a product.
template <int BITS>
__device__ __forceinline__ void linear(const Operation& op) {
    constexpr int CHUNK = 128 / BITS;  // weights in 16 bytes
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int turns = (op.K * BITS / 8 + TURN - 1) / TURN, tiles = (op.N + 15) / 16;
    extern __shared__ uint4 ring_and_x[];
    __shared__ float part[2][WARPS][16], sums[32];
    uint4* x = ring_and_x + RING * 512;
    uint4* norm = x + turns * (TURN / BITS);  // its weights; x is padded
    Ring ring;
    ring.place = ring_and_x + threadIdx.x;
    start_next();
    ring.point_at(op, blockIdx.x, 0);
#pragma unroll
    for (int r = 0; r < RING; r++) ring.fetch(r);
    for (int i = threadIdx.x; i < op.K / 8 && op.norm_weight; i += WARPS * 32) {
        norm[i] = ((const uint4*)op.norm_weight)[i];
        norm[op.K / 8 + i] = ((const uint4*)op.norm_bias)[i];
    }
    wait();
    for (int i = threadIdx.x; i < turns * (TURN / BITS); i += WARPS * 32)
        x[i] = i * 8 < op.K ? __ldcg((const uint4*)op.input + i) : make_uint4(0, 0, 0, 0);
    // Each thread needs nothing but what it has stored itself.
    if (op.norm_weight) normalise(x, norm, norm + op.K / 8, op, sums);
    __syncthreads();
    const uint4* my_x = x + (warp * 4 + t) * CHUNK / 8;
    int buffer = 0;  // sums of every second tile have another
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, buffer ^= 1) {
        float even[4] = {0, 0, 0, 0}, odd[4] = {0, 0, 0, 0};
        // One thread finishes one sum; what it needs for that is loaded early.
        const int n = tile * 16 + threadIdx.x;
        const Finish end = prepare(op, threadIdx.x / 16, n, 1, op.N);
        for (int turn = 0; turn < turns; turn++) {
            if (turn + 1 < turns)
                ring.point_at(op, tile, turn + 1);
            else
                ring.point_at(op, tile + gridDim.x, 0);
            const uint4* turn_x = my_x + turn * (TURN / BITS);
#pragma unroll
            for (int r = 0; r < RING; r++) {
                const uint4* xs = turn_x + r * WARPS * 4 * CHUNK / 8;
                wait_copies<RING - 1>();
                const uint4 first = ring.place[r * 512], second = ring.place[r * 512 + 256];
                const u32 w[4] = {first.x, first.y, first.z, first.w}, v[4] = {second.x, second.y, second.z, second.w};
#pragma unroll
                for (int j = 0; j < CHUNK / 8; j++) {  // 8 weights of either row
                    const uint4 b = xs[j];
                    u32 c[4], d[4];
                    if (BITS == 8) {
                        widen8(w[2 * j], c);
                        widen8(w[2 * j + 1], c + 2);
                        widen8(v[2 * j], d);
                        widen8(v[2 * j + 1], d + 2);
                    } else if (BITS == 4) {
                        widen4(w[j], c);
                        widen4(v[j], d);
                    } else {
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            c[i] = w[i];
                            d[i] = v[i];
                        }
                    }
                    multiply(even, c[0], d[0], c[1], d[1], b.x, b.y);
                    multiply(odd, c[2], d[2], c[3], d[3], b.z, b.w);
                }
                ring.fetch(r);
            }
        }
        if (t == 0) {
            part[buffer][warp][g] = even[0] + odd[0];
            part[buffer][warp][g + 8] = even[2] + odd[2];
        }
        __syncthreads();
        if (threadIdx.x < 16 && n < op.N) {
            float sum = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += part[buffer][w][threadIdx.x];
            finish(op, end, sum, 0, n, op.N);
        }
    }
}

#define ROW(BITS)                                                                                           \
    extern "C" __global__ void __launch_bounds__(256, 2) row_##BITS(const __grid_constant__ Operation op) { \
        linear<BITS>(op);                                                                                   \
    }
