// The epilogue of a linear, per output: y = gelu(sum * scale + bias) or sum * scale + bias + alpha * residual.
#pragma once

#include "kernels/cuda/common.cuh"

__device__ __forceinline__ float gelu(float v) {  // tanh form
    float u = 0.7978845608028654f * v * (1.0f + 0.044715f * v * v);
    return __fdividef(v, 1.0f + __expf(-2.0f * u));
}

struct Epilogue {
    const u16* scale;     // [N] or null
    const u16* bias;      // [N] or null
    const u16* residual;  // [M, N] or null; float32 where a kernel says so
    void* y;              // [M, N]
    float alpha;
    int gelu;
};
// Of one output, as loaded: a conversion would wait for the load.
struct EpilogueOperands {
    u16 scale, bias, residual;
};
__device__ __forceinline__ EpilogueOperands load_operands(const Epilogue& e, int m, int n, int M, int N) {
    EpilogueOperands f = {0, 0, 0};
    if (m < M && n < N) {
        if (e.scale) f.scale = e.scale[n];
        if (e.bias) f.bias = e.bias[n];
        if (e.residual) f.residual = e.residual[(size_t)m * N + n];
    }
    return f;
}
__device__ __forceinline__ float apply_epilogue(const Epilogue& e, const EpilogueOperands& f, float sum) {
    if (e.scale) sum *= to_float(f.scale);
    sum += to_float(f.bias);
    if (e.gelu) sum = gelu(sum);
    return sum + e.alpha * to_float(f.residual);
}
__device__ __forceinline__ void store_output(const Epilogue& e, const EpilogueOperands& f, float sum, int m, int n,
                                             int N) {
    ((u16*)e.y)[(size_t)m * N + n] = to_u16(apply_epilogue(e, f, sum));
}
