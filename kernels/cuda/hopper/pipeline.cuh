// Tile and pipeline barriers of the linears on Hopper.
#pragma once

#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/hopper/ptx.cuh"

constexpr int TILE_N = 128, CONSUMERS = 8;       // columns of y; warps with products
constexpr int PITCH = 48, STAGING = 32 * PITCH;  // bytes of a row of y and of a warp, for the epilogue

// Initialises the barriers of each stage: full (the producers of weights and x arrive), empty (the consumers arrive).
__device__ __forceinline__ void init_barriers(u32 full, u32 empty, const int& stages,
                                              u32 arrivals_per_phase = CONSUMERS) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < stages; i++) {
            mbarrier_init(full + i * 8, 2);
            mbarrier_init(empty + i * 8, arrivals_per_phase);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
}
