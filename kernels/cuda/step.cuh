// The begin and the end of a decoding step of one token for each of B sequences. Kernels of the module step_HEAD_DIM.
#pragma once

#include "kernels/cuda/common.cuh"

// Begins a step. Grid: B; block: 256. Alignment: embedding and its rows to 16 bytes.
struct BeginStep {
    const long long* ids;        // [B]
    const u16* embedding;        // [vocabulary, width]
    const float* frequencies;    // [HEAD_DIM / 2R]
    const long long* positions;  // [B, R]
    u16* hidden;                 // [B, width]: embeddings of ids
    float *cosines, *sines;      // [B, HEAD_DIM] of positions, rounded as the model's dtype rounds them
    int width, R;
};
extern "C" __global__ void begin_step(const __grid_constant__ BeginStep a) {
    pdl_launch_dependents();
    pdl_wait();
    const int b = blockIdx.x;
    const u16* row = a.embedding + a.ids[b] * a.width;
    for (int k = threadIdx.x * 8; k < a.width; k += blockDim.x * 8)
        *(uint4*)(a.hidden + (size_t)b * a.width + k) = *(const uint4*)(row + k);
    for (int i = threadIdx.x; i < HEAD_DIM; i += blockDim.x) {
        const int part = HEAD_DIM / a.R;
        const float position = (float)a.positions[b * a.R + i / part], frequency = a.frequencies[i % (part / 2)];
#if BF16
        const float angle = position * frequency;
#else
        const float angle = to_float(to_u16(to_float(to_u16(position)) * frequency));
#endif
        a.cosines[b * HEAD_DIM + i] = to_float(to_u16(cosf(angle)));
        a.sines[b * HEAD_DIM + i] = to_float(to_u16(sinf(angle)));
    }
}

// Ends a step: positions += advance, slots += 1. Grid: 1; block: 256.
struct EndStep {
    long long* positions;      // [B, R]
    const long long* advance;  // [B, R]
    int* slots;                // [B]
    int B, R;
};
extern "C" __global__ void end_step(const __grid_constant__ EndStep a) {
    pdl_launch_dependents();
    pdl_wait();
    for (int i = threadIdx.x; i < a.B * a.R; i += blockDim.x) a.positions[i] += a.advance[i];
    for (int i = threadIdx.x; i < a.B; i += blockDim.x) a.slots[i] += 1;
}
