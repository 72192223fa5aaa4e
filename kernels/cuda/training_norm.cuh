// LayerNorm in training under autocast: its result in float32, and rounded to 16 bits for the next linear; and its
// gradient. Module: training.
//
// Shapes: x [M, K], K % 8 == 0, K <= 4096 * EIGHTS. Grid: M; block: 512. Alignment: 16 bytes.
// A thread has every 512th eight numbers of a row, at most EIGHTS of them, in registers.
#pragma once

#include "kernels/cuda/layer_norm.cuh"

__device__ __forceinline__ void load8(const void* p, size_t i, bool is_float, float (&v)[8]) {
    if (is_float) {
        const float4 a = ((const float4*)p)[2 * i], b = ((const float4*)p)[2 * i + 1];
        v[0] = a.x;
        v[1] = a.y;
        v[2] = a.z;
        v[3] = a.w;
        v[4] = b.x;
        v[5] = b.y;
        v[6] = b.z;
        v[7] = b.w;
    } else {
        const uint4 a = ((const uint4*)p)[i];
        v[0] = low(a.x);
        v[1] = high(a.x);
        v[2] = low(a.y);
        v[3] = high(a.y);
        v[4] = low(a.z);
        v[5] = high(a.z);
        v[6] = low(a.w);
        v[7] = high(a.w);
    }
}
__device__ __forceinline__ void store8(void* p, size_t i, bool is_float, const float (&v)[8]) {
    if (is_float) {
        ((float4*)p)[2 * i] = make_float4(v[0], v[1], v[2], v[3]);
        ((float4*)p)[2 * i + 1] = make_float4(v[4], v[5], v[6], v[7]);
    } else {
        ((uint4*)p)[i] = make_uint4(pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7]));
    }
}

// A row of x, its mean and the inverse of its standard deviation. sums: [32] in shared memory.
template <int EIGHTS>
struct Row {
    float v[EIGHTS][8], mean, scale;
    __device__ __forceinline__ Row(const void* x, size_t row, bool is_float, float epsilon, int K, float* sums) {
        float sum = 0;
#pragma unroll
        for (int j = 0; j < EIGHTS; j++) {
            const int i = threadIdx.x + j * 512;
            if (i >= K / 8) break;
            load8(x, row + i, is_float, v[j]);
#pragma unroll
            for (int e = 0; e < 8; e++) sum += v[j][e];
        }
        mean = block_sum(sum, sums) / K;
        sum = 0;
#pragma unroll
        for (int j = 0; j < EIGHTS; j++) {
            if (threadIdx.x + j * 512 >= K / 8) break;
#pragma unroll
            for (int e = 0; e < 8; e++) sum += (v[j][e] - mean) * (v[j][e] - mean);
        }
        scale = rsqrtf(block_sum(sum, sums + 16) / K + epsilon);
    }
};

struct NormForward {
    const void *x, *weight, *bias;  // float32 or 16 bits
    float* y;
    u16* rounded;
    float epsilon;
    int x_is_float, weight_is_float, K;
};
struct NormBackward {
    const void *x, *weight;
    const float* grad_y;
    const u16* grad_rounded;
    void* grad_x;  // of x's dtype
    float epsilon;
    int x_is_float, weight_is_float, K;
};

// y, rounded: LayerNorm of x.
template <int EIGHTS>
__device__ __forceinline__ void norm_forward(const void* x, const void* weight, const void* bias, float* y,
                                             u16* rounded, float epsilon, bool x_is_float, bool weight_is_float,
                                             int K) {
    __shared__ float sums[32];
    const size_t row = (size_t)blockIdx.x * (K / 8);
    Row<EIGHTS> r(x, row, x_is_float, epsilon, K, sums);
#pragma unroll
    for (int j = 0; j < EIGHTS; j++) {
        const int i = threadIdx.x + j * 512;
        if (i >= K / 8) break;
        float w[8], b[8];
        load8(weight, i, weight_is_float, w);
        load8(bias, i, weight_is_float, b);
#pragma unroll
        for (int e = 0; e < 8; e++) b[e] += (r.v[j][e] - r.mean) * r.scale * w[e];
        store8(y, row + i, true, b);
        store8(rounded, row + i, false, b);
    }
}

// grad_x, from the gradients of y and rounded.
template <int EIGHTS>
__device__ __forceinline__ void norm_backward(const void* x, const void* weight, const float* grad_y,
                                              const u16* grad_rounded, void* grad_x, float epsilon, bool x_is_float,
                                              bool weight_is_float, int K) {
    __shared__ float sums[64];
    const size_t row = (size_t)blockIdx.x * (K / 8);
    Row<EIGHTS> r(x, row, x_is_float, epsilon, K, sums);
    float g[EIGHTS][8], sum = 0, product = 0;
#pragma unroll
    for (int j = 0; j < EIGHTS; j++) {
        const int i = threadIdx.x + j * 512;
        if (i >= K / 8) break;
        float w[8], rounded[8];
        load8(grad_y, row + i, true, g[j]);
        load8(grad_rounded, row + i, false, rounded);
        load8(weight, i, weight_is_float, w);
#pragma unroll
        for (int e = 0; e < 8; e++) {
            r.v[j][e] = (r.v[j][e] - r.mean) * r.scale;
            g[j][e] = (g[j][e] + rounded[e]) * w[e];
            sum += g[j][e];
            product += g[j][e] * r.v[j][e];
        }
    }
    sum = block_sum(sum, sums + 32) / K;
    product = block_sum(product, sums + 48) / K;
#pragma unroll
    for (int j = 0; j < EIGHTS; j++) {
        const int i = threadIdx.x + j * 512;
        if (i >= K / 8) break;
#pragma unroll
        for (int e = 0; e < 8; e++) g[j][e] = (g[j][e] - sum - r.v[j][e] * product) * r.scale;
        store8(grad_x, row + i, x_is_float, g[j]);
    }
}

#define NORMS(EIGHTS)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(512, 4 / EIGHTS) norm_forward_##EIGHTS(const NormForward a) {        \
        norm_forward<EIGHTS>(a.x, a.weight, a.bias, a.y, a.rounded, a.epsilon, a.x_is_float, a.weight_is_float, a.K); \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(512, EIGHTS == 1 ? 3 : 1)                                            \
        norm_backward_##EIGHTS(const NormBackward a) {                                                                \
        norm_backward<EIGHTS>(a.x, a.weight, a.grad_y, a.grad_rounded, a.grad_x, a.epsilon, a.x_is_float,             \
                              a.weight_is_float, a.K);                                                                \
    }
NORMS(1) NORMS(2) NORMS(4)
