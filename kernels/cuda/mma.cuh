// One tensor core product of a warp: 16 x 16 weights times 16 x 8 activations.
//
// Source: PTX ISA, "Matrix fragments for mma.m16n8k16". sm_75 makes it of two m16n8k8; sm_70 of ordinary arithmetic.
#pragma once

#include "kernels/cuda/common.cuh"

// d += a * b. With g = lane / 4, t = lane % 4, a lane has
//   d: row g, columns 2t and 2t + 1; row g + 8, the same columns;
//   a: pairs of k at (row g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8);
//   b: pairs of k at (2t, column g), (2t + 8, column g).
#if __CUDA_ARCH__ >= 750
__device__ __forceinline__
#else
__device__ __noinline__  // long code on sm_70
#endif
    void mma_m16n8k16(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if BF16
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
        " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#elif __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
        " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#elif __CUDA_ARCH__ >= 750
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(b0));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a2), "r"(a3), "r"(b1));
#else
    // Volta's tensor cores have another layout. Lane 4c + s has column c of b.
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
