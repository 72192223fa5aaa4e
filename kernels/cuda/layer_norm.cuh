// LayerNorm of a row by a block, the variance around the mean (two passes).
#pragma once

#include "kernels/cuda/common.cuh"

// LayerNorm of eight numbers of a row; scale = 1 / standard deviation.
__device__ __forceinline__ uint4 layer_norm8(uint4 x, float mean, float scale, uint4 weight, uint4 bias) {
    auto two = [&](u32 x, u32 weight, u32 bias) {
        return pack((low(x) - mean) * scale * low(weight) + low(bias),
                    (high(x) - mean) * scale * high(weight) + high(bias));
    };
    return make_uint4(two(x.x, weight.x, bias.x), two(x.y, weight.y, bias.y), two(x.z, weight.z, bias.z),
                      two(x.w, weight.w, bias.w));
}

// Reduces v over a block of at most 16 warps. shared: [16], not read since the last barrier.
__device__ __forceinline__ float block_sum(float v, float* shared) {
#pragma unroll
    for (int i = 16; i; i /= 2) v += __shfl_xor_sync(~0u, v, i);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
    __syncthreads();
    v = 0;
    for (int i = 0; i < blockDim.x / 32; i++) v += shared[i];
    return v;
}

// A LayerNorm before a linear.
struct Norm {
    const u16* norm_weight;  // [K], or null: none
    const u16* norm_bias;    // [K]
    u16* normed;             // [M, K]: block 0 stores the result
    float epsilon;
};

// LayerNorm of x [K] in place, in shared memory; K % 8 == 0. A thread reads and writes every blockDim'th 16 bytes
// alone. normed: null, or where block 0 stores the result, too. shared: [32].
__device__ __forceinline__ void layer_norm_row(uint4* x, const uint4* weight, const uint4* bias, u16* normed,
                                               float epsilon, int K, float* shared) {
    float sum = 0;
    for (int i = threadIdx.x; i < K / 8; i += blockDim.x) {
        const uint4 v = x[i];
        sum += low(v.x) + high(v.x) + low(v.y) + high(v.y) + low(v.z) + high(v.z) + low(v.w) + high(v.w);
    }
    const float mean = block_sum(sum, shared) / K;
    sum = 0;
    for (int i = threadIdx.x; i < K / 8; i += blockDim.x) {
        const uint4 v = x[i];
        const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float a = low(words[j]) - mean, b = high(words[j]) - mean;
            sum += a * a + b * b;
        }
    }
    const float scale = rsqrtf(block_sum(sum, shared + 16) / K + epsilon);
    for (int i = threadIdx.x; i < K / 8; i += blockDim.x) {
        x[i] = layer_norm8(x[i], mean, scale, weight[i], bias[i]);
        if (normed && blockIdx.x == 0) ((uint4*)normed)[i] = x[i];
    }
}
