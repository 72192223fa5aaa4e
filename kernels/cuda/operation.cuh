// What a kernel of a step of one token is given.
#pragma once

#include "kernels/cuda/common.cuh"

// An operation on one token. `kernels_cuda.Operation` is the same struct.
struct Operation {
    const void* input;  // x [K]; qkv [B, H * 3 * D]; ids [B]
    void* output;       // y [N]; [B, H * D]; hidden [B, N]
    const unsigned char* weight;
    const u16* scale;
    const u16* bias;
    const u16* residual;
    const u16* norm_weight;  // [K] or null: x is normalised first,
    const u16* norm_bias;
    u16* normed;     // [K], and stored here
    float* cosines;  // [B, D]
    float* sines;
    const float* frequencies;  // [D / 2R]
    long long* positions;      // [B, R]
    const long long* advance;
    u16* keys;  // [B, H, T, D]
    u16* values;
    int* slots;          // [B]
    const int* padding;  // [B]
    float* partials;
    u32* arrivals;
    int bits, N, K, gelu, H, T, R, prefix, most;
    float alpha, epsilon;
};
