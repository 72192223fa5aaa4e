// Tensor core products of a warpgroup: 64 weight rows in registers times TILE_M rows of x in shared memory, K = 16.
//
// Source: PTX ISA, "Asynchronous warpgroup level matrix instructions". A warp has 16 weight rows, laid out as in
// mma.cuh.
#pragma once

#include "kernels/cuda/hopper/ptx.cuh"

// Descriptor of rows of 128 bytes with the 128-byte swizzle, K-major. From 8 rows to the next 8: 1024 bytes.
__device__ __forceinline__ unsigned long long smem_descriptor(u32 address) {
    return (address & 0x3ffff) >> 4 | 1ull << 16 | (1024ull >> 4) << 32 | 1ull << 62;
}

// wgmma(sums, a, b): sums += a * b, asynchronously. An overload for each TILE_M; sums: float[TILE_M / 2].
#define REGISTERS_10(tens)                                                                                            \
    "%" #tens "0, %" #tens "1, %" #tens "2, %" #tens "3, %" #tens "4, %" #tens "5, %" #tens "6, %" #tens "7, %" #tens \
    "8, %" #tens "9, "
#define REGISTERS_30 REGISTERS_10() REGISTERS_10(1) REGISTERS_10(2)
#define REGISTERS_60 REGISTERS_30 REGISTERS_10(3) REGISTERS_10(4) REGISTERS_10(5)
#define REGISTERS_90 REGISTERS_60 REGISTERS_10(6) REGISTERS_10(7) REGISTERS_10(8)
#define REGISTERS_120 REGISTERS_90 REGISTERS_10(9) REGISTERS_10(10) REGISTERS_10(11)
#define SUMS_4(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define SUMS_16(i) SUMS_4(i), SUMS_4(i + 4), SUMS_4(i + 8), SUMS_4(i + 12)
#define SUMS_32(i) SUMS_16(i), SUMS_16(i + 16)
#define WGMMA(TILE, REGISTERS, A, B, ...)                                                                       \
    __device__ __forceinline__ void wgmma(float (&sums)[TILE / 2], const u32* a, unsigned long long b) {        \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #TILE "k16.f32." TYPE "." TYPE " {" REGISTERS "}, {" A \
                     "}, " B ", 1, 1, 1, 0;"                                                                    \
                     : __VA_ARGS__                                                                              \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                     \
    }
WGMMA(64, REGISTERS_30 "%30, %31", "%32, %33, %34, %35", "%36", SUMS_32(0))
WGMMA(128, REGISTERS_60 "%60, %61, %62, %63", "%64, %65, %66, %67", "%68", SUMS_32(0), SUMS_32(32))
WGMMA(192, REGISTERS_90 "%90, %91, %92, %93, %94, %95", "%96, %97, %98, %99", "%100", SUMS_32(0), SUMS_32(32),
      SUMS_32(64))
WGMMA(256, REGISTERS_120 "%120, %121, %122, %123, %124, %125, %126, %127", "%128, %129, %130, %131", "%132", SUMS_32(0),
      SUMS_32(32), SUMS_32(64), SUMS_32(96))
#undef WGMMA

// Orders writes of registers before a product; closes a group of products; waits until at most LEFT groups run.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
