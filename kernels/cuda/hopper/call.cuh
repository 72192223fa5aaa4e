// What the linears on Hopper are given, and what they share.
#pragma once

#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/hopper/ptx.cuh"

// What a kernel is given; see `kernels_cuda._CALL`.
struct Call {
    TensorMap weight, x;
    const u16 *scale, *bias, *residual;
    u16* y;
    float alpha;
    int gelu, M, N, K;
    int stages;  // of few rows
    int wide;    // of many rows: residual and y are float32; what is added to the residual is rounded before
};

constexpr int ROWS = 128, WARPS = 8;             // columns of y; warps that multiply
constexpr int PITCH = 48, STAGING = 32 * PITCH;  // bytes from token to token and of a warp, in the end

// Barriers of each stage of a ring: `full` when weights and x are there, `free` when so many have left it.
__device__ __forceinline__ void init_ring(u32 full, u32 free, const int& stages, u32 leaving = WARPS) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < stages; i++) {
            init_barrier(full + i * 8, 2);
            init_barrier(free + i * 8, leaving);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
}
