// The half weight q * scale [N, K] of a quantised weight, for cuBLAS. Kernels of the module prompt.
//
// Grid: (K / 8 threads, at most N / 4; K % 8: N); a thread for 8 columns of 4 rows. Any alignment of rows.
#pragma once

#include "kernels/cuda/dequantize.cuh"

struct Expand {
    const unsigned char* weight;
    const u16* scale;
    u16* y;
    int N, K;
};

template <int bits>
__device__ __forceinline__ void expand(const unsigned char* __restrict__ weight, const u16* __restrict__ scale,
                                       u16* __restrict__ y, int N, int K) {
    const int k = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    const size_t row_bytes = (size_t)K * bits / 8;
    if (k >= K) return;
    if (K % 8 == 0) {
        for (int first = blockIdx.y * 4; first < N; first += gridDim.y * 4) {
            uint2 v[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const unsigned char* p = weight + (first + i) * row_bytes + k * bits / 8;
                v[i] = make_uint2(0, 0);
                if (first + i < N) {
                    if (bits == 8)
                        v[i] = *(const uint2*)p;
                    else
                        v[i].x = *(const u32*)p;
                }
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (first + i >= N) break;
                const float s = to_float(scale[first + i]);
                u32 w[4];
                if (bits == 8) {
                    dequantize_int8(v[i].x, w);
                    dequantize_int8(v[i].y, w + 2);
                } else
                    dequantize_int4(v[i].x, w);
                *(uint4*)(y + (size_t)(first + i) * K + k) =
                    make_uint4(pack(low(w[0]) * s, high(w[0]) * s), pack(low(w[1]) * s, high(w[1]) * s),
                               pack(low(w[2]) * s, high(w[2]) * s), pack(low(w[3]) * s, high(w[3]) * s));
            }
        }
    } else {
        for (int n = blockIdx.y; n < N; n += gridDim.y)
            for (int i = k; i < min(k + 8, K); i++) {
                const unsigned char* p = weight + n * row_bytes;
                int v;
                if (bits == 8)
                    v = (signed char)p[i];
                else
                    v = (i & 1) ? (int)((u32)p[i / 2] << 28) >> 28 : (int)((u32)p[i / 2] << 24) >> 28;
                y[(size_t)n * K + i] = to_u16(v * to_float(scale[n]));
            }
    }
}
extern "C" __global__ void expand_8(const Expand a) { expand<8>(a.weight, a.scale, a.y, a.N, a.K); }
extern "C" __global__ void expand_4(const Expand a) { expand<4>(a.weight, a.scale, a.y, a.N, a.K); }
