// Products of a warpgroup on the tensor cores, sm_90a.
#pragma once

#include "kernels/cuda/hopper/ptx.cuh"

// 16 columns of rows of 128 swizzled bytes, for the tensor cores; 1024 bytes lead from 8 rows to the next 8.
__device__ __forceinline__ unsigned long long describe(u32 address) {
    return (address & 0x3ffff) >> 4 | 1ull << 16 | (1024ull >> 4) << 32 | 1ull << 62;
}
// sums += a · b, later. a, for 64 weight rows, and sums as of `multiply`, a warp having 16 rows; b: `describe`.

#define TEN(d) "%" #d "0, %" #d "1, %" #d "2, %" #d "3, %" #d "4, %" #d "5, %" #d "6, %" #d "7, %" #d "8, %" #d "9"
#define SUMS_8(i)                                                                                                 \
    "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), "+f"(sums[i + 5]), \
        "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define MULTIPLY_ASYNC(TOKENS, SUMS, A0, A1, A2, A3, B, ...)                                                        \
    __device__ __forceinline__ void multiply_async(float (&sums)[TOKENS / 2], const u32* a, unsigned long long b) { \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #TOKENS "k16.f32." TYPE "." TYPE " {" SUMS "}, {%" #A0     \
                     ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", 1, 1, 1, 0;"                                        \
                     : __VA_ARGS__                                                                                  \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                         \
    }
MULTIPLY_ASYNC(64, TEN() ", " TEN(1) ", " TEN(2) ", %30, %31", 32, 33, 34, 35, 36, SUMS_8(0), SUMS_8(8), SUMS_8(16),
               SUMS_8(24))
MULTIPLY_ASYNC(128, TEN() ", " TEN(1) ", " TEN(2) ", " TEN(3) ", " TEN(4) ", " TEN(5) ", %60, %61, %62, %63", 64, 65,
               66, 67, 68, SUMS_8(0), SUMS_8(8), SUMS_8(16), SUMS_8(24), SUMS_8(32), SUMS_8(40), SUMS_8(48), SUMS_8(56))
MULTIPLY_ASYNC(192,
               TEN() ", " TEN(1) ", " TEN(2) ", " TEN(3) ", " TEN(4) ", " TEN(5) ", " TEN(6) ", " TEN(7) ", " TEN(
                   8) ", %90, %91, %92, %93, %94, %95",
               96, 97, 98, 99, 100, SUMS_8(0), SUMS_8(8), SUMS_8(16), SUMS_8(24), SUMS_8(32), SUMS_8(40), SUMS_8(48),
               SUMS_8(56), SUMS_8(64), SUMS_8(72), SUMS_8(80), SUMS_8(88))
MULTIPLY_ASYNC(256,
               TEN() ", " TEN(1) ", " TEN(2) ", " TEN(3) ", " TEN(4) ", " TEN(5) ", " TEN(6) ", " TEN(7) ", " TEN(
                   8) ", " TEN(9) ", " TEN(10) ", " TEN(11) ", %120, %121, %122, %123, %124, %125, %126, %127",
               128, 129, 130, 131, 132, SUMS_8(0), SUMS_8(8), SUMS_8(16), SUMS_8(24), SUMS_8(32), SUMS_8(40),
               SUMS_8(48), SUMS_8(56), SUMS_8(64), SUMS_8(72), SUMS_8(80), SUMS_8(88), SUMS_8(96), SUMS_8(104),
               SUMS_8(112), SUMS_8(120))
#undef TEN
#undef SUMS_8
#undef MULTIPLY_ASYNC

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
