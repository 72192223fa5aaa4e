// What follows a product: scale, bias, GELU or a residual.
#pragma once

#include "kernels/cuda/common.cuh"

__device__ __forceinline__ float gelu(float v) {  // the tanh form
    float u = 0.7978845608028654f * v * (1.0f + 0.044715f * v * v);
    return __fdividef(v, 1.0f + __expf(-2.0f * u));
}

// What becomes of a sum: scale and bias of row n, then GELU, or alpha times a residual. An Operation has these, too.
struct Epilogue {
    const u16* scale;     // [N] or null
    const u16* bias;      // [N] or null
    const u16* residual;  // [M, N] or null
    float alpha;
    int gelu;
    void* output;  // [M, N]
};
struct Finish {
    u16 scale, bias, residual;
};  // not converted yet, so that nobody waits for them
template <class E>
__device__ __forceinline__ Finish prepare(const E& e, int m, int n, int M, int N) {
    Finish f = {0, 0, 0};
    if (m < M && n < N) {
        if (e.scale) f.scale = e.scale[n];
        if (e.bias) f.bias = e.bias[n];
        if (e.residual) f.residual = e.residual[(size_t)m * N + n];
    }
    return f;
}
template <class E>
__device__ __forceinline__ float finished(const E& e, const Finish& f, float sum) {
    if (e.scale) sum *= to_float(f.scale);
    sum += to_float(f.bias);
    if (e.gelu) sum = gelu(sum);
    return sum + e.alpha * to_float(f.residual);
}
template <class E>
__device__ __forceinline__ void finish(const E& e, const Finish& f, float sum, int m, int n, int N) {
    ((u16*)e.output)[(size_t)m * N + n] = to_u16(finished(e, f, sum));
}
