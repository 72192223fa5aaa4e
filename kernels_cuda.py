"""INT8 and INT4 products, and the small operations of a decoding step, on NVIDIA GPUs.

CUDA C++ in strings below is compiled by NVRTC at the first call, through the binding of cpm_kernels, loaded by its
`LazyKernelCModule` and launched by its `KernelFunction`. Compiled modules are kept in a folder (see `cache_folder`).

Letters: M rows of an activation, K in_features, N out_features, B batch, H heads, D head width, T places in a cache.

Activations are float16 or bfloat16, sums are float32. Needs compute capability 7.0, for bfloat16 8.0. Without
cpm_kernels, NVRTC or a driver, `available` says why, once, and the caller goes on in PyTorch.
"""

import ctypes
import functools
import glob
import hashlib
import importlib
import importlib.util
import os
import re
import sys
import tempfile
import threading
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch

# Types and the two operations that every kernel needs: eight bytes or nibbles to numbers, and a product of 16 × 16
# weights with 16 × 8 activations on the tensor cores. No header is included, which makes NVRTC twice as fast.
_COMMON = r"""
typedef unsigned int u32;
typedef unsigned short u16;   // the bits of a half or a bfloat16

#if BF16
__device__ __forceinline__ float to_float(u16 v) { return __uint_as_float((u32)v << 16); }
__device__ __forceinline__ u16 to_u16(float f) { u16 r; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(f)); return r; }
#else
__device__ __forceinline__ float to_float(u16 v) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v)); return f; }
__device__ __forceinline__ u16 to_u16(float f) { u16 r; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(f)); return r; }
#endif
__device__ __forceinline__ float low(u32 v) { return to_float((u16)v); }
__device__ __forceinline__ float high(u32 v) { return to_float((u16)(v >> 16)); }
__device__ __forceinline__ u32 pack(float a, float b) { return (u32)to_u16(a) | ((u32)to_u16(b) << 16); }

// Programmatic dependent launch: a kernel may start, and read weights, while the one before it still runs; what that
// one wrote may be read only after wait(). Both do nothing in an ordinary launch.
__device__ __forceinline__ void start_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#if __CUDA_ARCH__ >= 750
#define LINE ".L2::128B"   // have the L2 cache fetch whole lines
#else
#define LINE ""
#endif
// 16 bytes that are read once; zeros if they are not inside.
__device__ __forceinline__ uint4 load_stream(const void* p, bool inside = true) {
    uint4 v;
    asm volatile("{ .reg .pred inside; setp.ne.s32 inside, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0;"
        " mov.u32 %3, 0; @inside ld.global.nc.L1::no_allocate" LINE ".v4.u32 {%0,%1,%2,%3}, [%4]; }"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w) : "l"(p), "r"((int)inside));
    return v;
}

// 16 bytes on their way into shared memory, or zeros; on older devices at once.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool inside) {
#if __CUDA_ARCH__ >= 800
    u32 address = (u32)__cvta_generic_to_shared(to);
    int bytes = inside ? 16 : 0;   // the rest is filled with zeros
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
        :: "r"(address), "l"(from), "r"(bytes) : "memory");
#else
    *(uint4*)to = inside ? *(const uint4*)from : make_uint4(0, 0, 0, 0);
#endif
}
__device__ __forceinline__ void commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int LEFT> __device__ __forceinline__ void wait_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" :: "n"(LEFT) : "memory");
#endif
}

// Four weights of a word, in order, as two pairs. A byte b in the low bits of 0x6400 is the half 1024 + b.
__device__ __forceinline__ void widen8(u32 w, u32* out) {
#if BF16
    // 0x4300 is 128 with a unit in its last place: seven bits fit, and the sign bit is subtracted as 0 or 128.
    u32 a = __byte_perm(w, 0x43434343, 0x4140), b = __byte_perm(w, 0x43434343, 0x4342);
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out[0]) : "r"(a & 0xff80ff80), "r"(0xbf80bf80), "r"(a & 0xff7fff7f));
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out[1]) : "r"(b & 0xff80ff80), "r"(0xbf80bf80), "r"(b & 0xff7fff7f));
#else
    w ^= 0x80808080;
    u32 a = __byte_perm(w, 0x64646464, 0x4140), b = __byte_perm(w, 0x64646464, 0x4342);
    asm("sub.f16x2 %0, %1, %2;" : "=r"(out[0]) : "r"(a), "r"(0x64806480));
    asm("sub.f16x2 %0, %1, %2;" : "=r"(out[1]) : "r"(b), "r"(0x64806480));
#endif
}
// Eight nibbles of a word, in order (the even column is the high nibble), as four pairs.
__device__ __forceinline__ void widen4(u32 w, u32* out) {
    w ^= 0x88888888;
    const u32 s = w >> 4;
#if BF16
    const u32 magic = 0x43004300;   // 128 + n
#else
    const u32 magic = 0x64006400;   // 1024 + n
#endif
    u32 p[4] = {__byte_perm(s, w, 0x4440), __byte_perm(s, w, 0x5541), __byte_perm(s, w, 0x6662),
                __byte_perm(s, w, 0x7773)};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 v = (p[i] & 0x000f000f) | magic;
#if BF16
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out[i]) : "r"(v), "r"(0x3f803f80), "r"(0xc308c308));
#else
        asm("sub.f16x2 %0, %1, %2;" : "=r"(out[i]) : "r"(v), "r"(0x64086408));
#endif
    }
}

// d[row g, columns 2t, 2t+1], d[row g+8, …] += a · b, g = lane / 4, t = lane % 4. a: pairs of k (row g, 2t), (row g+8,
// 2t), (row g, 2t+8), (row g+8, 2t+8); b: pairs (2t, column g), (2t+8, column g).
#if __CUDA_ARCH__ >= 750
__device__ __forceinline__
#else
__device__ __noinline__   // it is long
#endif
void multiply(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if BF16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
        " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#elif __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
        " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#elif __CUDA_ARCH__ >= 750
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(b0));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a2), "r"(a3), "r"(b1));
#else
    // Volta's tensor cores have another layout: ordinary arithmetic, right but slow. Lane 4c + s has column c of b.
    const int g4 = threadIdx.x & 28, t = threadIdx.x & 3;
#pragma unroll 1
    for (int s = 0; s < 4; s++) {
        u32 r0 = __shfl_sync(~0u, a0, g4 + s), r1 = __shfl_sync(~0u, a1, g4 + s);
        u32 r2 = __shfl_sync(~0u, a2, g4 + s), r3 = __shfl_sync(~0u, a3, g4 + s);
#pragma unroll
        for (int c = 0; c < 2; c++) {
            u32 q0 = __shfl_sync(~0u, b0, (2 * t + c) * 4 + s), q1 = __shfl_sync(~0u, b1, (2 * t + c) * 4 + s);
            d[c] += low(r0) * low(q0) + high(r0) * high(q0) + low(r2) * low(q1) + high(r2) * high(q1);
            d[c + 2] += low(r1) * low(q0) + high(r1) * high(q0) + low(r3) * low(q1) + high(r3) * high(q1);
        }
    }
#endif
}

__device__ __forceinline__ float gelu(float v) {   // the tanh form
    float u = 0.7978845608028654f * v * (1.0f + 0.044715f * v * v);
    return v / (1.0f + __expf(-2.0f * u));
}

// What becomes of a sum: scale and bias of row n, then GELU, or alpha times a residual.
struct Epilogue {
    const u16* scale;      // [N] or null
    const u16* bias;       // [N] or null
    const u16* residual;   // [M, N] or null
    float alpha;
    int gelu;
    u16* y;                // [M, N]
};
struct Finish { u16 scale, bias, residual; };   // not converted yet, so that nobody waits for them
__device__ __forceinline__ Finish prepare(const Epilogue& e, int m, int n, int M, int N) {
    Finish f = {0, 0, 0};
    if (m < M && n < N) {
        if (e.scale) f.scale = e.scale[n];
        if (e.bias) f.bias = e.bias[n];
        if (e.residual) f.residual = e.residual[(size_t)m * N + n];
    }
    return f;
}
__device__ __forceinline__ void finish(const Epilogue& e, const Finish& f, float sum, int m, int n, int N) {
    if (e.scale) sum *= to_float(f.scale);
    sum += to_float(f.bias);
    if (e.gelu) sum = gelu(sum);
    e.y[(size_t)m * N + n] = to_u16(sum + e.alpha * to_float(f.residual));
}
"""

# Few rows: x is kept whole in shared memory. A block of 8 warps, two to a multiprocessor, owns 16 · HEIGHT weight rows
# at a time, each warp every eighth 64 bytes of them. RING 16-byte loads a thread and row are under way at any time,
# from before the kernel's turn (weights depend on nothing) to its end, over the boundaries of tiles.
# Grid: any; block: 256; weight, x and rows of both aligned to 16 bytes.
_ROWS = r"""
template <int BITS, int COLUMNS, int HEIGHT>
__device__ __forceinline__ void rows(const unsigned char* __restrict__ weight, const u16* x,
                                     const Epilogue& e, int M, int N, int K) {
    constexpr int WARPS = 8, RING = 8 / HEIGHT;
    constexpr int CHUNK = 128 / BITS;                  // weights in 16 bytes
    constexpr int STEP = 4 * CHUNK;                    // weights in 64 bytes
    constexpr int TURN = RING * WARPS * 64;            // bytes of a row that are under way
    constexpr int TILE = 16 * HEIGHT;
    extern __shared__ uint4 shared_x[];
    __shared__ float part[2][WARPS][TILE * COLUMNS];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const size_t row_bytes = (size_t)K * BITS / 8;
    const int turns = (row_bytes + TURN - 1) / TURN;   // of a tile
    const int tiles = (N + TILE - 1) / TILE;
    const int stride = turns * (TURN * 8 / BITS) + (COLUMNS > 1 ? 8 : 0);

    uint4 ring[RING][2 * HEIGHT];
    // Where this thread's bytes of a turn begin, in row g, and how many weights there are from there on.
    const unsigned char* p;
    int left, rows_left;
    auto point_at = [&](int tile, int turn) {
        const int k = (turn * RING * WARPS + warp) * STEP + t * CHUNK, n = tile * TILE + g;
        p = weight + n * row_bytes + (size_t)k * BITS / 8;
        left = K - k;
        rows_left = N - n;
    };
    auto fetch = [&](int r) {
#pragma unroll
        for (int h = 0; h < 2 * HEIGHT; h++)
            ring[r][h] = load_stream(p + h * 8 * row_bytes + r * WARPS * 64,
                                     r * WARPS * STEP < left && h * 8 < rows_left);
    };

    start_next();
    point_at(blockIdx.x, 0);
#pragma unroll
    for (int r = 0; r < RING; r++) fetch(r);
    wait();
    for (int i = threadIdx.x; i < M * (stride / 8); i += WARPS * 32) {
        const int m = i / (stride / 8), k = (i % (stride / 8)) * 8;
        copy_async(&shared_x[i], k < K ? x + (size_t)m * K + k : x, k < K);
    }
    commit();
    wait_copies<0>();
    __syncthreads();
    const u16* my_x = (u16*)shared_x + (COLUMNS > 1 ? min(g, M - 1) * stride : 0) + warp * STEP + t * CHUNK;

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
            const uint4* turn_x = (const uint4*)(my_x + turn * (TURN * 8 / BITS));
#pragma unroll
            for (int r = 0; r < RING; r++) {
                const uint4* xs = turn_x + r * WARPS * STEP / 8;
                u32 w[2 * HEIGHT][4];
#pragma unroll
                for (int h = 0; h < 2 * HEIGHT; h++) {
                    w[h][0] = ring[r][h].x; w[h][1] = ring[r][h].y; w[h][2] = ring[r][h].z; w[h][3] = ring[r][h].w;
                }
#pragma unroll
                for (int j = 0; j < CHUNK / 8; j++) {   // 8 weights of every row
                    const uint4 b = xs[j];
#pragma unroll
                    for (int h = 0; h < HEIGHT; h++) {
                        u32 c[4], d[4];
                        if (BITS == 8) {
                            widen8(w[2 * h][2 * j], c); widen8(w[2 * h][2 * j + 1], c + 2);
                            widen8(w[2 * h + 1][2 * j], d); widen8(w[2 * h + 1][2 * j + 1], d + 2);
                        } else if (BITS == 4) {
                            widen4(w[2 * h][j], c); widen4(w[2 * h + 1][j], d);
                        } else {
#pragma unroll
                            for (int i = 0; i < 4; i++) { c[i] = w[2 * h][i]; d[i] = w[2 * h + 1][i]; }
                        }
                        multiply(even[h], c[0], d[0], c[1], d[1], b.x, b.y);
                        multiply(odd[h], c[2], d[2], c[3], d[3], b.z, b.w);
                    }
                }
                fetch(r);
            }
        }
        // All columns are alike when there is one row: column 0 is with the lanes t = 0.
        float* mine = part[buffer][warp];
#pragma unroll
        for (int h = 0; h < HEIGHT; h++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int at = h * 16 + i / 2 * 8 + g;
                if (COLUMNS > 1) mine[(2 * t + i % 2) * TILE + at] = even[h][i] + odd[h][i];
                else if (i % 2 == 0 && t == 0) mine[at] = even[h][i] + odd[h][i];
            }
        __syncthreads();
        if (m < M && n < N) {
            float sum = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += part[buffer][w][threadIdx.x];
            finish(e, end, sum, m, n, N);
        }
    }
}
#define ROWS(NAME, BITS, COLUMNS, HEIGHT) \
extern "C" __global__ void __launch_bounds__(256, 2) NAME(const unsigned char* weight, const u16* x, \
        const u16* scale, const u16* bias, const u16* residual, float alpha, int use_gelu, u16* y, \
        int M, int N, int K) { \
    const Epilogue e = {scale, bias, residual, alpha, use_gelu, y}; \
    rows<BITS, COLUMNS, HEIGHT>(weight, x, e, M, N, K); \
}
ROWS(row_8, 8, 1, 1)
ROWS(row_4, 4, 1, 2)
ROWS(row_16, 16, 1, 1)
ROWS(rows_8, 8, 8, 1)
ROWS(rows_4, 4, 8, 2)
"""

# Many rows: a block owns 64 · HEIGHT weight rows (blockIdx.x), MT rows of x (blockIdx.z), and a part of K (blockIdx.y).
# Weights and x come through shared memory, STAGES - 1 steps ahead; each thread widens the weights that it copied
# itself, once for all MT rows. With several parts of K, the block that comes last adds them up, in their order.
# Block: 128; alignment as above.
_TILES = r"""
template <int BITS, int MT, int HEIGHT, int STAGES>
__device__ __forceinline__ void tiles(const unsigned char* __restrict__ weight, const u16* x,
                                      const Epilogue& e, float* parts, u32* tickets, int M, int N, int K) {
    constexpr int CHUNK = 128 / BITS, HALF = 4 * CHUNK, STEP = 2 * HALF, NT = MT / 8, STRIDE = (STEP + 8) / 8;
    constexpr int THREADS = 128, WEIGHTS = 4 * HEIGHT * THREADS, STAGE = WEIGHTS + MT * STRIDE;   // in 16 bytes
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
            copy_async(&shared[slot * STAGE + WEIGHTS + m * STRIDE + c],
                       inside ? x + (size_t)(column + m) * K + k : x, inside);
        }
        commit();
    };

    start_next();
    for (int s = 0; s < STAGES - 1; s++) copy_weights(begin + s, s);
    wait();
    for (int s = 0; s < STAGES - 1; s++) copy_x(begin + s, s);   // the first group has all the weights, too

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
                words[h][0] = w.x; words[h][1] = w.y; words[h][2] = w.z; words[h][3] = w.w;
            }
#pragma unroll
            for (int j = 0; j < CHUNK / 8; j++) {   // 8 weights of every row
                u32 a[2 * HEIGHT][4];
#pragma unroll
                for (int h = 0; h < 2 * HEIGHT; h++) {
                    if (BITS == 8) { widen8(words[h][2 * j], a[h]); widen8(words[h][2 * j + 1], a[h] + 2); }
                    else widen4(words[h][j], a[h]);
                }
#pragma unroll
                for (int c = 0; c < NT; c++) {
                    const uint4 b = xs[c * 8 * STRIDE + j];
#pragma unroll
                    for (int h = 0; h < HEIGHT; h++) {
                        u32 (&p)[4] = a[2 * h], (&q)[4] = a[2 * h + 1];
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
            if (is_last) tickets[tile] = 0;   // for the next launch
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
#define TILES(NAME, BITS, MT, HEIGHT, STAGES, BLOCKS) \
extern "C" __global__ void __launch_bounds__(128, BLOCKS) NAME(const unsigned char* weight, const u16* x, \
        const u16* scale, const u16* bias, const u16* residual, float alpha, int use_gelu, u16* y, \
        float* parts, u32* tickets, int M, int N, int K) { \
    const Epilogue e = {scale, bias, residual, alpha, use_gelu, y}; \
    tiles<BITS, MT, HEIGHT, STAGES>(weight, x, e, parts, tickets, M, N, K); \
}
"""

# What remains of a product when the weight is expanded for cuBLAS.
_EXPAND = r"""
// The float weight q · scale [N, K]: a thread widens 8 weights of 4 rows; grid.x over the row, grid.y over rows.
template <int BITS>
__device__ __forceinline__ void expand(const unsigned char* __restrict__ weight, const u16* __restrict__ scale,
                                       u16* __restrict__ out, int N, int K) {
    const int k = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    const size_t row_bytes = (size_t)K * BITS / 8;
    if (k >= K) return;
    if (K % 8 == 0) {
        for (int first = blockIdx.y * 4; first < N; first += gridDim.y * 4) {
            uint2 v[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const unsigned char* p = weight + (first + i) * row_bytes + k * BITS / 8;
                v[i] = make_uint2(0, 0);
                if (first + i < N) {
                    if (BITS == 8) v[i] = *(const uint2*)p;
                    else v[i].x = *(const u32*)p;
                }
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (first + i >= N) break;
                const float s = to_float(scale[first + i]);
                u32 w[4];
                if (BITS == 8) { widen8(v[i].x, w); widen8(v[i].y, w + 2); }
                else widen4(v[i].x, w);
                *(uint4*)(out + (size_t)(first + i) * K + k) =
                    make_uint4(pack(low(w[0]) * s, high(w[0]) * s), pack(low(w[1]) * s, high(w[1]) * s),
                               pack(low(w[2]) * s, high(w[2]) * s), pack(low(w[3]) * s, high(w[3]) * s));
            }
        }
    } else {
        for (int n = blockIdx.y; n < N; n += gridDim.y)
            for (int i = k; i < min(k + 8, K); i++) {
                const unsigned char* p = weight + n * row_bytes;
                int v;
                if (BITS == 8) v = (signed char)p[i];
                else v = (i & 1) ? (int)((u32)p[i / 2] << 28) >> 28 : (int)((u32)p[i / 2] << 24) >> 28;
                out[(size_t)n * K + i] = to_u16(v * to_float(scale[n]));
            }
    }
}
extern "C" __global__ void expand_8(const unsigned char* weight, const u16* scale, u16* out, int N, int K) {
    expand<8>(weight, scale, out, N, K);
}
extern "C" __global__ void expand_4(const unsigned char* weight, const u16* scale, u16* out, int N, int K) {
    expand<4>(weight, scale, out, N, K);
}
"""

# The small operations of a step of one token for each of B sequences.
_STEP = r"""
// y = LayerNorm(x), a block of 512 threads a row, K ≤ 16384, K % 8 == 0. The variance is taken around the mean.
__device__ __forceinline__ float block_sum(float v, float* shared) {
#pragma unroll
    for (int i = 16; i; i /= 2) v += __shfl_xor_sync(~0u, v, i);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
    __syncthreads();
    v = 0;
#pragma unroll
    for (int i = 0; i < 16; i++) v += shared[i];
    return v;
}
extern "C" __global__ void __launch_bounds__(512) layer_norm(const u16* x, const u16* weight, const u16* bias, u16* y,
                                                             float epsilon, int K) {
    __shared__ float shared[16];
    start_next();
    wait();
    float v[4][8];
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int k = (i * 512 + threadIdx.x) * 8;
        if (k < K) {
            const uint4 w = *(const uint4*)(x + (size_t)blockIdx.x * K + k);
            const u32 words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
            for (int j = 0; j < 4; j++) { v[i][2 * j] = low(words[j]); v[i][2 * j + 1] = high(words[j]); }
#pragma unroll
            for (int j = 0; j < 8; j++) sum += v[i][j];
        }
    }
    const float mean = block_sum(sum, shared) / K;
    sum = 0;
#pragma unroll
    for (int i = 0; i < 4; i++)
        if ((i * 512 + threadIdx.x) * 8 < K)
#pragma unroll
            for (int j = 0; j < 8; j++) sum += (v[i][j] - mean) * (v[i][j] - mean);
    const float scale = rsqrtf(block_sum(sum, shared) / K + epsilon);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int k = (i * 512 + threadIdx.x) * 8;
        if (k < K) {
            u32 out[4];
            const uint4 w = *(const uint4*)(weight + k), b = *(const uint4*)(bias + k);
            const u32 ws[4] = {w.x, w.y, w.z, w.w}, bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (int j = 0; j < 4; j++)
                out[j] = pack((v[i][2 * j] - mean) * scale * low(ws[j]) + low(bs[j]),
                              (v[i][2 * j + 1] - mean) * scale * high(ws[j]) + high(bs[j]));
            *(uint4*)(y + (size_t)blockIdx.x * K + k) = make_uint4(out[0], out[1], out[2], out[3]);
        }
    }
}

// Begins a step: the embedding of ids [B] → hidden [B, hidden]; cosines and sines [B, D] of positions [B, R], rounded
// as the model's dtype rounds them. A block a sequence.
extern "C" __global__ void begin_step(const long long* ids, const u16* embedding, u16* hidden, int width,
                                      const long long* positions, const float* frequencies, float* cosines,
                                      float* sines, int D, int R) {
    const int b = blockIdx.x;
    start_next();
    wait();
    const u16* row = embedding + ids[b] * width;
    for (int k = threadIdx.x * 8; k < width; k += blockDim.x * 8)
        *(uint4*)(hidden + (size_t)b * width + k) = *(const uint4*)(row + k);
    for (int i = threadIdx.x; i < D; i += blockDim.x) {
        const int part = D / R;
        const float position = (float)positions[b * R + i / part], frequency = frequencies[i % (part / 2)];
#if BF16
        const float angle = position * frequency;
#else
        const float angle = to_float(to_u16(to_float(to_u16(position)) * frequency));
#endif
        cosines[b * D + i] = to_float(to_u16(cosf(angle)));
        sines[b * D + i] = to_float(to_u16(sinf(angle)));
    }
}
// Ends it: the positions move on, and so does the slot. One block.
extern "C" __global__ void end_step(long long* positions, const long long* advance, int count, int* slot) {
    start_next();
    wait();
    for (int i = threadIdx.x; i < count; i += blockDim.x) positions[i] += advance[i];
    if (threadIdx.x == 0) *slot += 1;
}

#define MOST_PARTS 32
__device__ __forceinline__ float2 lane_part(const float2* heads, int i, int parts) {
    return i < parts ? __ldcg(heads + i) : make_float2(-1e30f, 0.0f);
}

// One query for each of B · H heads: rotates query and key, stores key and value at `slot` of the caches [B, H, T, D],
// and attends to the keys up to there but those of the padding (P ≤ j < P + padding[b]). Block: 128 threads for
// a head (blockIdx.y = b · H + h) and a part of the keys; D / 8 threads share a key. The last block of a head adds up.
// Slot and older keys were there before the step began, so they are read before the kernel's turn.
template <int D>
__device__ __forceinline__ void attend(const u16* qkv, const float* cosines, const float* sines,
        u16* keys, u16* values, const int* slot, const int* padding, int P, int H, int T, int R,
        int most, float* parts, u32* tickets, u16* out) {
    constexpr int LANES = D / 8, GROUPS = 128 / LANES, AHEAD = 8;
    __shared__ float q[D], sums[GROUPS], maxima[GROUPS], outs[GROUPS][D], weights[MOST_PARTS];
    __shared__ uint4 new_key[D / 8];
    __shared__ bool is_last;
    const int head = blockIdx.y, b = head / H, lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
    start_next();
    // How keys are cut depends on their number, not on T, so that the same question gets the same sums.
    const int n = *slot + 1, per = (n + 64 * most - 1) / (64 * most) * 64, used = (n + per - 1) / per;
    if (blockIdx.x >= used) return;
    const int begin = blockIdx.x * per, end = min(begin + per, n), hidden_to = P + padding[b];
    const u16* mine = qkv + (size_t)head * 3 * D;
    u16* cache_k = keys + (size_t)head * T * D;
    u16* cache_v = values + (size_t)head * T * D;
    uint4 k[AHEAD], v[AHEAD];
    auto fetch = [&](int base) {
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            const int j = base + a * GROUPS + group;
            k[a] = v[a] = make_uint4(0, 0, 0, 0);
            if (j < end && j < n - 1) {
                k[a] = ((const uint4*)(cache_k + (size_t)j * D))[lane];
                v[a] = ((const uint4*)(cache_v + (size_t)j * D))[lane];
            }
        }
    };
    fetch(begin);
    wait();
    for (int i = threadIdx.x; i < D; i += 128) {
        const int half = D / R / 2;
        const bool first = i % (2 * half) < half;
        const int other = first ? i + half : i - half;
        const float c = cosines[b * D + i], s = first ? -sines[b * D + i] : sines[b * D + i];
        q[i] = to_float(to_u16(to_float(mine[i]) * c + to_float(mine[other]) * s)) * rsqrtf((float)D);
        ((u16*)new_key)[i] = to_u16(to_float(mine[D + i]) * c + to_float(mine[D + other]) * s);
    }
    __syncthreads();
    const uint4 new_value = ((const uint4*)(mine + 2 * D))[lane];
    if (end == n && group == 0) {
        ((uint4*)(cache_k + (size_t)(n - 1) * D))[lane] = new_key[lane];
        ((uint4*)(cache_v + (size_t)(n - 1) * D))[lane] = new_value;
    }
    float my_q[8], acc[8], largest = -1e30f, sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) { my_q[i] = q[lane * 8 + i]; acc[i] = 0; }
    for (int base = begin; base < end; base += GROUPS * AHEAD) {
        if (base > begin) fetch(base);
        float score[AHEAD], top = largest;
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            const int j = base + a * GROUPS + group;
            if (j == n - 1) { k[a] = new_key[lane]; v[a] = new_value; }
            float s = my_q[0] * low(k[a].x) + my_q[1] * high(k[a].x) + my_q[2] * low(k[a].y) + my_q[3] * high(k[a].y)
                    + my_q[4] * low(k[a].z) + my_q[5] * high(k[a].z) + my_q[6] * low(k[a].w) + my_q[7] * high(k[a].w);
#pragma unroll
            for (int i = LANES / 2; i; i /= 2) s += __shfl_xor_sync(~0u, s, i);
            score[a] = j < end && (j < P || j >= hidden_to) ? s : -1e30f;
            top = fmaxf(top, score[a]);
        }
        const float shrink = __expf(largest - top);
        largest = top;
        sum *= shrink;
#pragma unroll
        for (int i = 0; i < 8; i++) acc[i] *= shrink;
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            const float p = score[a] > -1e29f ? __expf(score[a] - top) : 0.0f;
            sum += p;
            acc[0] += p * low(v[a].x); acc[1] += p * high(v[a].x); acc[2] += p * low(v[a].y);
            acc[3] += p * high(v[a].y); acc[4] += p * low(v[a].z); acc[5] += p * high(v[a].z);
            acc[6] += p * low(v[a].w); acc[7] += p * high(v[a].w);
        }
    }
    if (lane == 0) { sums[group] = sum; maxima[group] = largest; }
#pragma unroll
    for (int i = 0; i < 8; i++) outs[group][lane * 8 + i] = acc[i];
    __syncthreads();
    float top = -1e30f, total = 0;
    for (int i = 0; i < GROUPS; i++) top = fmaxf(top, maxima[i]);
    for (int i = 0; i < GROUPS; i++) total += sums[i] * __expf(maxima[i] - top);
    // Of every part: D sums of values; and beside all of them, its largest score and its sum of weights.
    float* part = parts + (size_t)head * gridDim.x * (D + 2);
    float2* heads = (float2*)(part + gridDim.x * D);
    for (int i = threadIdx.x; i < D; i += 128) {
        float o = 0;
#pragma unroll
        for (int j = 0; j < GROUPS; j++) o += outs[j][i] * __expf(maxima[j] - top);
        if (used == 1) out[(size_t)head * D + i] = to_u16(o / total);
        else part[blockIdx.x * D + i] = o;
    }
    if (used == 1) return;
    if (threadIdx.x == 0) heads[blockIdx.x] = make_float2(top, total);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(&tickets[head], 1) == used - 1;
        if (is_last) tickets[head] = 0;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    if (threadIdx.x < 32) {   // a lane a part
        const float2 h = lane_part(heads, threadIdx.x, used);
        float largest_part = h.x;
#pragma unroll
        for (int i = 16; i; i /= 2) largest_part = fmaxf(largest_part, __shfl_xor_sync(~0u, largest_part, i));
        const float w = __expf(h.x - largest_part);
        float all = h.y * w;
#pragma unroll
        for (int i = 16; i; i /= 2) all += __shfl_xor_sync(~0u, all, i);
        weights[threadIdx.x] = w / all;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < D; i += 128) {
        float o = 0;
#pragma unroll 8
        for (int s = 0; s < used; s++) o += __ldcg(part + s * D + i) * weights[s];
        out[(size_t)head * D + i] = to_u16(o);
    }
}
#define ATTEND(D) \
extern "C" __global__ void __launch_bounds__(128) attend_##D(const u16* qkv, const float* cosines, const float* sines, \
        u16* keys, u16* values, const int* slot, const int* padding, int P, int H, int T, int R, \
        int most, float* parts, u32* tickets, u16* out) { \
    attend<D>(qkv, cosines, sines, keys, values, slot, padding, P, H, T, R, most, parts, tickets, out); \
}
ATTEND(16)
ATTEND(32)
ATTEND(64)
ATTEND(128)

// A prompt's queries, keys and values out of qkv [B, S, H, 3·D], rotated by cosines and sines [B, S, D]:
// queries [B, H, S, D] and, into the places from `place` on, caches [B, H, T, D]. A thread for 8 numbers; D % 16 == 0.
extern "C" __global__ void split_rotate(const u16* __restrict__ qkv, const u16* __restrict__ cosines,
        const u16* __restrict__ sines, u16* queries, u16* keys, u16* values, int B, int S, int H, int D, int R, int T,
        int place) {
    const int lanes = D / 8, i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= B * S * H * lanes) return;
    const int k = i % lanes * 8, h = i / lanes % H, s = i / lanes / H % S, b = i / lanes / H / S;
    const int half = D / R / 2;
    const size_t token = (size_t)b * S + s;
    const u16* mine = qkv + (token * H + h) * 3 * D;
    u16 q[8], key[8];
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const bool first = (k + j) % (2 * half) < half;
        const int other = first ? k + j + half : k + j - half;
        const float c = to_float(cosines[token * D + k + j]);
        const float n = first ? -to_float(sines[token * D + k + j]) : to_float(sines[token * D + k + j]);
        q[j] = to_u16(to_float(mine[k + j]) * c + to_float(mine[other]) * n);
        key[j] = to_u16(to_float(mine[D + k + j]) * c + to_float(mine[D + other]) * n);
    }
    const size_t head = (size_t)b * H + h, to = (head * T + place + s) * D + k;
    *(uint4*)(queries + (head * S + s) * D + k) = *(uint4*)q;
    *(uint4*)(keys + to) = *(uint4*)key;
    *(uint4*)(values + to) = *(const uint4*)(mine + 2 * D + k);
}
"""

_REMEDY = (
    "Install what is missing (pip install cpm_kernels; NVRTC comes with PyTorch's CUDA wheels or the CUDA toolkit), or "
    "go on without: PyTorch computes the same, more slowly."
)
# Activations of up to so many rows are multiplied by the tensor core kernels; beyond, expanding the weight and leaving
# the product to cuBLAS is faster.
_MOST_ROWS = 128
_SHARED_LIMIT = 32 * 1024  # of a kernel that has not asked for more; it has up to 16 KB beside
# Of the kernels tiles_BITS_MT: (HEIGHT, STAGES, blocks that a multiprocessor holds at once).
_TILE_SHAPES = {
    (8, 8): (1, 4, 4),
    (8, 16): (1, 4, 4),
    (8, 32): (2, 3, 3),
    (8, 64): (2, 3, 2),
    (4, 8): (1, 4, 4),
    (4, 16): (1, 3, 4),
    (4, 32): (2, 2, 3),
    (4, 64): (2, 2, 2),
}
_SOURCES = {"rows": _COMMON + _ROWS, "step": _COMMON + _EXPAND + _STEP}
for (_bits, _width), (_height, _stages, _blocks) in _TILE_SHAPES.items():  # modules of their own: few are ever needed
    _name = f"tiles_{_bits}_{_width}"
    _SOURCES[_name] = _COMMON + _TILES + f"TILES({_name}, {_bits}, {_width}, {_height}, {_stages}, {_blocks})\n"
_lock = threading.RLock()
_local = threading.local()


# --- Finding and loading the libraries ---


def find_library(name: str) -> str | None:
    """Path of a CUDA library, or its bare name where the loader knows it.

    Args:
        name: "cuda" (the driver), "cudart" or "nvrtc".

    Looks where PyTorch's own wheels put their libraries, in the folders of the namespace package `nvidia` and in
    `torch/lib`. The library of PyTorch's CUDA version is preferred, then the newest. None if there is none: cpm_kernels
    then looks in `CUDA_PATH`, /usr/local/cuda and the linker's cache.
    """
    if name == "cuda":
        driver = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
        try:
            ctypes.CDLL(driver)  # on a machine with a GPU, PyTorch has loaded it already
        except OSError:
            return None
        return driver
    folders = []
    nvidia = importlib.util.find_spec("nvidia")
    for folder in nvidia.submodule_search_locations or () if nvidia else ():
        folders += glob.glob(os.path.join(folder, "*", "lib")) + glob.glob(os.path.join(folder, "*", "bin"))
    folders.append(os.path.join(os.path.dirname(torch.__file__), "lib"))
    pattern = re.compile(rf"lib{name}(?:-[0-9a-f]+)?\.so\.(\d+)[\d.]*|{name}(?:64)?_(\d+)[\d_]*\.dll")
    preferred = int((torch.version.cuda or "0").split(".")[0])
    found = []
    for folder in folders:
        for file in os.listdir(folder) if os.path.isdir(folder) else ():
            match = pattern.fullmatch(file)
            if match:
                major = int((match[1] or match[2])[:2])
                found.append((major == preferred, major, os.path.join(folder, file)))
    return max(found)[2] if found else None


_PRIVATE = f"{__name__}_cpm_kernels"


@functools.cache
def load_libraries() -> types.ModuleType:
    """The bindings of cpm_kernels: `nvrtc`, `cuda` (the driver), `cudart`. They load on machines without a GPU, too.

    cpm_kernels opens its libraries where it is imported, knows nothing of PyTorch's wheels and wants `pkg_resources`
    for kernels of its own. So the modules that are needed are loaded as a private copy, under other names, whose
    search begins with `find_library`. What the user imports as cpm_kernels is not touched, and neither is the
    environment.

    Raises:
        Exception: cpm_kernels is not installed, or can't be loaded.
    """
    spec = importlib.util.find_spec("cpm_kernels")
    if spec is None:
        raise ImportError("cpm_kernels is not installed")

    def hollow(name: str, *path: str) -> types.ModuleType:
        module = types.ModuleType(name)
        module.__path__ = [os.path.join(folder, *path) for folder in spec.submodule_search_locations]
        sys.modules[name] = module
        return module

    hollow(_PRIVATE)
    hollow(f"{_PRIVATE}.kernels", "kernels")
    library = hollow(f"{_PRIVATE}.library", "library")
    lib = importlib.import_module(f"{_PRIVATE}.library.base")
    for search in ("unix_find_lib", "windows_find_lib"):
        theirs = getattr(lib, search)
        setattr(lib, search, lambda name, theirs=theirs: find_library(name) or theirs(name))
    lib.logger.disabled = True  # it lists symbols that newer CUDA versions dropped; those needed raise by themselves
    for name in ("cuda", "cudart", "nvrtc", "cublaslt"):
        setattr(library, name, importlib.import_module(f"{_PRIVATE}.library.{name}"))
    library.cublaslt.cublasLtCreate = lambda: None  # cpm_kernels makes a handle for every device; not needed here
    return library


@functools.cache
def load_launcher() -> types.ModuleType:
    """`cpm_kernels.kernels.base`: `LazyKernelCModule` and `KernelFunction`. Needs a GPU; raises as `load_libraries`."""
    load_libraries()
    stand_in = "pkg_resources" not in sys.modules
    if stand_in:
        sys.modules["pkg_resources"] = types.ModuleType("pkg_resources")
    try:
        return importlib.import_module(f"{_PRIVATE}.kernels.base")
    finally:
        if stand_in:
            del sys.modules["pkg_resources"]


# --- Compiling, with a cache on disk ---


def cache_folder() -> str:
    """Where compiled modules are kept: `chatglm_int8` below `$XDG_CACHE_HOME` or ~/.cache."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "chatglm_int8")


def compile_source(nvrtc, source: str, options: list[str]) -> bytes:
    """Compile CUDA C++ to machine code (a cubin), or to PTX where `options` name a virtual architecture.

    Args:
        nvrtc: the binding, `cpm_kernels.library.nvrtc`.

    Raises:
        RuntimeError: what the compiler said.
    """
    program = nvrtc.nvrtcProgram()
    nvrtc.nvrtcCreateProgram(program, source, "chatglm_int8.cu", 0, [], [])
    try:
        nvrtc.nvrtcCompileProgram(program, len(options), options)
        kind = "PTX" if any("=compute_" in option for option in options) else "CUBIN"
        code = ctypes.create_string_buffer(getattr(nvrtc, f"nvrtcGet{kind}Size")(program))
        getattr(nvrtc, f"nvrtcGet{kind}")(program, code)
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _module_code(nvrtc, name: str, bf16: bool, architecture: int) -> bytes:
    """Compiled code of a module, from the cache on disk if it is there."""
    options = ["--std=c++17", f"-DBF16={int(bf16)}", f"--gpu-architecture=sm_{architecture}"]
    key = repr((_SOURCES[name], options, nvrtc.version))
    file = f"cuda-{name}-sm_{architecture}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.cubin"
    path = os.path.join(cache_folder(), file)
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except OSError:
        pass
    code = compile_source(nvrtc, _SOURCES[name], options)
    try:
        os.makedirs(cache_folder(), exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=cache_folder())
        with os.fdopen(handle, "wb") as stream:
            stream.write(code)
        os.replace(temporary, path)
    except OSError:
        pass  # a folder that can't be written to: compiled again next time
    return code


@functools.cache
def _module(name: str, bf16: bool, architecture: int):
    """A `LazyKernelCModule`, compiled if it is not in the cache."""
    return load_launcher().LazyKernelCModule(_module_code(load_libraries().nvrtc, name, bf16, architecture))


@functools.cache
def _function(name: str, module: str, bf16: bool, device: int):
    """A `KernelFunction`; `device` is the current one."""
    architecture, *_ = _properties(device)
    return load_launcher().KernelFunction(_module(module, bf16, architecture), name)


@functools.cache
def _allow_shared(function, bytes_: int) -> None:
    """Let a kernel have more dynamic shared memory than 48 KB on the current device."""
    cuda = load_libraries().cuda
    attribute = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    cuda.checkCUStatus(cuda.cuda._Lib__lib.cuFuncSetAttribute(function._prepare_func(), attribute, bytes_))


@functools.cache
def _properties(device: int) -> tuple[int, int, int]:
    """Compute capability (90 = 9.0), number of multiprocessors, and bytes of shared memory for one of two blocks."""
    properties = torch.cuda.get_device_properties(device)
    shared = properties.shared_memory_per_multiprocessor // 2 - 12 * 1024
    return properties.major * 10 + properties.minor, properties.multi_processor_count, shared


_availability: dict[tuple[int, torch.dtype], bool] = {}


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run on this device with activations of this dtype. The first call compiles or loads them.

    Where they should run and can't, a warning says why and what to do, once. They are off unless CHATGLM_CUDA_KERNEL=1
    is in the environment.
    """
    if device.type != "cuda" or torch.version.hip or dtype not in (torch.float16, torch.bfloat16):
        return False
    if os.environ.get("CHATGLM_CUDA_KERNEL") != "1":
        return False
    index = device.index if device.index is not None else torch.cuda.current_device()
    known = _availability.get((index, dtype))
    if known is None:
        with _lock:
            known = _availability.get((index, dtype))
            if known is None:
                known = _availability[index, dtype] = _try_to_load(index, dtype)
    return known


def _try_to_load(device: int, dtype: torch.dtype) -> bool:
    architecture, *_ = _properties(device)
    bf16 = dtype == torch.bfloat16
    if architecture < (80 if bf16 else 70) or torch.cuda.is_current_stream_capturing():
        return False
    try:
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()
            load_launcher()
            needed = ("rows", "step")
            with ThreadPoolExecutor() as pool:  # NVRTC compiles side by side
                list(pool.map(lambda name: _module(name, bf16, architecture), needed))
            for name in needed:
                _module(name, bf16, architecture).get_module()  # can't be done while a graph is captured
    except Exception as error:
        reason = " ".join(str(error).split())[:600] or type(error).__name__
        warnings.warn(f"The CUDA kernels of chatglm_int8 can't be used: {reason}. {_REMEDY}", stacklevel=2)
        return False
    return True


# --- Launching ---


class _LaunchAttribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15))


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        ("sizes", ctypes.c_uint * 7),  # of the grid, of the block, of dynamic shared memory in bytes
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("count", ctypes.c_uint),
    )


_DEPENDENT = _LaunchAttribute(6, 0, 1)  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, allowed


def _argument(value):
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int(value)


def _launch(like: torch.Tensor, module: str, name: str, grid: tuple, block: int, shared: int, *arguments) -> None:
    """Launch a kernel on the device of `like`, whose dtype it takes, and on PyTorch's current stream there."""
    index = like.device.index
    if torch.cuda.current_device() != index:
        with torch.cuda.device(index):
            return _launch(like, module, name, grid, block, shared, *arguments)
    architecture, *_ = _properties(index)
    function = _function(name, module, like.dtype == torch.bfloat16, index)
    if shared > _SHARED_LIMIT:
        _allow_shared(function, shared)
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    values = [_argument(value) for value in arguments]
    if architecture >= 90 and torch.cuda.is_current_stream_capturing():
        # cpm_kernels has no launch with attributes. In a graph the next kernel may begin before this one has ended.
        cuda = load_libraries().cuda
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        config = _LaunchConfig((*grid, block, 1, 1, shared), stream, ctypes.pointer(_DEPENDENT), 1)
        launch = cuda.cuda._Lib__lib.cuLaunchKernelEx
        cuda.checkCUStatus(launch(ctypes.byref(config), function._prepare_func(), pointers, None))
    else:
        function(grid, (block, 1, 1), shared, stream, values)
    return None


_tickets: dict[tuple[int, int], torch.Tensor] = {}
_TICKETS = 1 << 16


class own_tickets:
    """A context in which this thread's launches count their blocks in the given int32 zeros [65536], as a graph must
    that may run beside others."""

    def __init__(self, tickets: torch.Tensor):
        self.tickets = tickets

    def __enter__(self) -> None:
        self.before, _local.tickets = getattr(_local, "tickets", None), self.tickets

    def __exit__(self, *error) -> None:
        _local.tickets = self.before


def new_tickets(device: torch.device) -> torch.Tensor:
    """Zeros in which blocks of a launch count themselves; each launch leaves zeros behind."""
    return torch.zeros(_TICKETS, dtype=torch.int32, device=device)


def _get_tickets(device: torch.device) -> torch.Tensor:
    own = getattr(_local, "tickets", None)
    if own is not None and own.device == device:
        return own
    if torch.cuda.is_current_stream_capturing():
        return new_tickets(device)  # somebody else's graph: zeroed at each replay
    key = (device.index, torch.cuda.current_stream(device).cuda_stream)  # launches of a stream follow each other
    if key not in _tickets:
        _tickets[key] = new_tickets(device)
    return _tickets[key]


# --- Products ---


def expand(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The float weight q · scale [N, K], of the scales' dtype, of int8 [N, K] (INT4: [N, K/2]) and scales [N]."""
    n, k = weight.shape[0], weight.shape[1] * 8 // bits
    out = torch.empty(n, k, dtype=scale.dtype, device=weight.device)
    threads = -(-k // 8)
    block = min(256, -(-threads // 32) * 32)
    grid = (-(-threads // block), min(-(-n // 4) if k % 8 == 0 else n, 65535), 1)
    _launch(out, "step", f"expand_{bits}", grid, block, 0, weight, scale, out, n, k)
    return out


def _plan(m: int, n: int, k: int, bits: int, device: int) -> tuple | None:
    """How M rows are multiplied: (module, kernel, grid, threads, shared bytes, floats of partial sums).

    None: expand the weight.
    """
    architecture, processors, most_shared = _properties(device)
    if k * bits % 128 or k % 8 or m > (_MOST_ROWS if architecture >= 75 else 8):
        return None
    height = 2 if bits == 4 else 1
    turn = 512 // bits * 64 // height  # weights of a row that a block has under way
    padded = -(-k // turn) * turn
    shared = padded * 2 if m == 1 else m * (padded + 8) * 2
    if m <= (8 if bits < 16 else 1) and shared <= most_shared:
        name = f"row_{bits}" if m == 1 else f"rows_{bits}"
        return ("rows", name, (min(-(-n // (16 * height)), processors * 2), 1, 1), 256, shared, 0)
    if bits == 16:
        return None
    width = next(width for width in (8, 16, 32, 64) if m <= width or width == 64)
    height, stages, resident = _TILE_SHAPES[bits, width]
    rows, columns = -(-n // (64 * height)), -(-m // width)
    steps = -(-k * bits // 1024)
    parts = max(1, min(processors * resident // (rows * columns), steps // 4))
    if rows * columns > _TICKETS:
        parts = 1
    sums = rows * columns * parts * height * width * 64 if parts > 1 else 0
    shared = stages * (height * 8192 + width * (1024 // bits + 8) * 2)
    return (
        f"tiles_{bits}_{width}",
        f"tiles_{bits}_{width}",
        (rows, parts, columns),
        128,
        max(shared, height * width * 256),
        sums,
    )


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    bits: int = 8,
    gelu: bool = False,
    residual: torch.Tensor | None = None,
    alpha: float = 1.0,
) -> torch.Tensor:
    """x · (q · scale)ᵀ + bias, then GELU (tanh form) or + alpha · residual: [M, N] of x's dtype.

    Args:
        x: float16 or bfloat16 [M, K] on a GPU.
        weight: int8 [N, K]; INT4: [N, K/2] (see `quantization`); bits = 16: [N, K] of x's dtype.
        scale, bias: [N]; scale is None if bits = 16.
        residual: [M, N].
    """
    x = x.contiguous()
    m, k, n = x.shape[0], x.shape[1], weight.shape[0]
    scale, bias = (value if value is None or value.dtype == x.dtype else value.to(x.dtype) for value in (scale, bias))
    if m == 0:
        return x.new_empty(0, n)
    aligned = (x.data_ptr() | weight.data_ptr()) % 16 == 0 and weight.is_contiguous()
    plan = _plan(m, n, k, bits, x.device.index) if aligned else None
    if plan is None:
        wide = weight if bits == 16 else expand(weight.contiguous(), scale, bits)
        y = x @ wide.T if bias is None else torch.addmm(bias, x, wide.T)
        if gelu:
            y = torch.nn.functional.gelu(y, approximate="tanh")
        return y if residual is None else y.add_(residual, alpha=alpha)
    module, name, grid, block, shared, sums = plan
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    scratch = ()
    if module != "rows":
        scratch = (torch.empty(sums, dtype=torch.float32, device=x.device), _get_tickets(x.device))
    if residual is not None:
        residual = residual.contiguous()
    given = (weight, x, scale, bias, residual, float(alpha), int(gelu), y, *scratch, m, n, k)
    _launch(x, module, name, grid, block, shared, *given)
    return y


def linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """x · (q · scale)ᵀ + bias [M, N] for x [M, K]; see `product`."""
    return product(x, weight, scale, bias, bits)


def input_gradient(grad_y: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The gradient [M, K] of a `linear`'s input, for that of its output [M, N]; both half or bfloat16."""
    return grad_y @ expand(weight.contiguous(), scale.to(grad_y.dtype), bits)


# --- A step's small operations ---


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float) -> torch.Tensor:
    """LayerNorm over the last of x's dimensions, K; K ≤ 16384 and a multiple of 8."""
    x = x.contiguous()
    y = torch.empty_like(x)
    k = x.shape[-1]
    blocks = x.numel() // k
    given = (x, weight, bias, y, float(epsilon), k)
    _launch(x, "step", "layer_norm", (blocks, 1, 1), 512, 0, *given)
    return y


def begin_step(ids, embedding, positions, frequencies, head_dim: int) -> tuple:
    """Embeddings [B, hidden] of ids [B], and fp32 cosines and sines [B, D] of int64 positions [B, R].

    `frequencies` are fp32 [D / 2R].
    """
    batch, rows = positions.shape
    hidden = torch.empty(batch, embedding.shape[1], dtype=embedding.dtype, device=embedding.device)
    angles = torch.empty(2, batch, head_dim, dtype=torch.float32, device=embedding.device)
    given = (ids, embedding, hidden, embedding.shape[1], positions, frequencies, angles[0], angles[1], head_dim, rows)
    _launch(hidden, "step", "begin_step", (batch, 1, 1), 256, 0, *given)
    return hidden, angles[0], angles[1]


def end_step(like: torch.Tensor, positions, advance, slot) -> None:
    """positions += advance, both int64 [B, R]; slot += 1, an int32."""
    _launch(like, "step", "end_step", (1, 1, 1), 256, 0, positions, advance, positions.numel(), slot)


HEAD_DIMS = (16, 32, 64, 128)
MOST_PARTS = 32


def attend(qkv, cosines, sines, keys, values, slot, padding, prefix: int, rows: int, most: int) -> torch.Tensor:
    """Attention of one token for each of B sequences; stores its key and value at place `slot` of the caches.

    Args:
        qkv: [B, H · 3 · D], per head D queries, D keys, D values, not rotated.
        cosines, sines: of `begin_step`.
        keys, values: caches [B, H, T, D], of which the first `slot` places are filled.
        padding: int32 [B]: so many places after the first `prefix` are seen by nobody.
        rows: of positions, R.
        most: into how many parts the keys are cut at most, to be worked on at the same time; up to `MOST_PARTS`.

    Returns:
        [B, H · D].
    """
    batch, heads, places, head_dim = keys.shape
    out = torch.empty(batch, heads * head_dim, dtype=qkv.dtype, device=qkv.device)
    parts = min(most, -(-places // 64))
    sums = torch.empty(batch * heads * parts * (head_dim + 2), dtype=torch.float32, device=qkv.device)
    given = (qkv, cosines, sines, keys, values, slot, padding, prefix, heads, places, rows)
    grid = (parts, batch * heads, 1)
    given = (*given, most, sums, _get_tickets(qkv.device), out)
    _launch(qkv, "step", f"attend_{head_dim}", grid, 128, 0, *given)
    return out


def split_rotate(qkv, cosines, sines, keys, values, place: int) -> torch.Tensor:
    """The prompt's part of attention before the scores.

    Args:
        qkv: [B, S, H, 3 · D].
        cosines, sines: [B, S, D] of qkv's dtype, in R parts (`rotary_embedding`).
        keys, values: caches [B, H, T, D], filled from `place` on.

    Returns:
        the rotated queries [B, H, S, D].
    """
    batch, length, heads, triple = qkv.shape
    head_dim = triple // 3
    queries = torch.empty(batch, heads, length, head_dim, dtype=qkv.dtype, device=qkv.device)
    rows = cosines.shape[-2]
    blocks = -(-qkv.numel() // 3 // 8 // 256)
    given = (qkv, cosines, sines, queries, keys, values, batch, length, heads, head_dim, rows, keys.shape[2], place)
    _launch(qkv, "step", "split_rotate", (blocks, 1, 1), 256, 0, *given)
    return queries
