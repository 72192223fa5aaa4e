// Operations of a prompt: LayerNorm, rotary positions, and half weights for cuBLAS (expand.cuh). Module: prompt.
#pragma once

#include "kernels/cuda/expand.cuh"
#include "kernels/cuda/layer_norm.cuh"

// y = LayerNorm(x) of rows x [M, K]; K % 8 == 0. Grid: M; block: 512. Shared memory: 2 * K. Alignment: 16 bytes.
struct LayerNorm {
    const u16 *x, *weight, *bias;
    u16* y;
    float epsilon;
    int K;
};
extern "C" __global__ void __launch_bounds__(512) layer_norm(const LayerNorm a) {
    const u16 *const x = a.x, *const weight = a.weight, *const bias = a.bias;
    const int K = a.K;
    extern __shared__ uint4 row[];
    __shared__ float sums[32];
    pdl_launch_dependents();
    for (int i = threadIdx.x; i < K / 8; i += blockDim.x) {
        prefetch_l2(weight + i * 8);
        prefetch_l2(bias + i * 8);
    }
    pdl_wait();
    for (int i = threadIdx.x; i < K / 8; i += blockDim.x) row[i] = ((const uint4*)x)[(size_t)blockIdx.x * (K / 8) + i];
    layer_norm_row(row, (const uint4*)weight, (const uint4*)bias, nullptr, a.epsilon, K, sums);
    for (int i = threadIdx.x; i < K / 8; i += blockDim.x) ((uint4*)a.y)[(size_t)blockIdx.x * (K / 8) + i] = row[i];
}

// Splits qkv [B, S, H, 3 * D] and rotates by cosines and sines [B, S, D]: queries [B, S, H, D]; keys and values to the
// caches [B, H, T, D], from `place` on. A thread for 8 numbers of each; block: 256. D % 16 == 0; alignment: 16 bytes.
struct SplitRotate {
    const u16 *qkv, *cosines, *sines;
    u16 *queries, *keys, *values;
    int B, S, H, D, R, T, place;
};
__device__ __forceinline__ void split_rotate(const u16* __restrict__ qkv, const u16* __restrict__ cosines,
                                             const u16* __restrict__ sines, const SplitRotate a) {
    const int B = a.B, S = a.S, H = a.H, D = a.D, R = a.R;
    const int lanes = D / 8, i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= B * S * H * lanes) return;
    const int k = i % lanes * 8, h = i / lanes % H, s = i / lanes / H % S, b = i / lanes / H / S;
    const int half = D / R / 2;
    const size_t token = (size_t)b * S + s;
    const u16* mine = qkv + (token * H + h) * 3 * D;
    u16 q[8], key[8];
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const bool first = (k + j) % (2 * half) < half;
        const int other = first ? k + j + half : k + j - half;
        const float c = to_float(cosines[token * D + k + j]);
        const float n = first ? -to_float(sines[token * D + k + j]) : to_float(sines[token * D + k + j]);
        q[j] = to_u16(to_float(mine[k + j]) * c + to_float(mine[other]) * n);
        key[j] = to_u16(to_float(mine[D + k + j]) * c + to_float(mine[D + other]) * n);
    }
    const size_t head = (size_t)b * H + h, to = (head * a.T + a.place + s) * D + k;
    *(uint4*)(a.queries + (token * H + h) * D + k) = *(uint4*)q;
    *(uint4*)(a.keys + to) = *(uint4*)key;
    *(uint4*)(a.values + to) = *(const uint4*)(mine + 2 * D + k);
}
extern "C" __global__ void split_rotate(const SplitRotate a) { split_rotate(a.qkv, a.cosines, a.sines, a); }

// Rotates queries and keys of qkv [tokens, H, 3 * D] by cosines and sines [tokens, D], whose halves of each of R parts
// are equal. sign -1 rotates back. A thread for 8 numbers of each half; block: 256. D / R % 16 == 0; alignment: 16
// bytes.
struct Rotate {
    const u16 *qkv, *cosines, *sines;
    u16* y;
    float sign;
    int tokens, H, D, R;
};
__device__ __forceinline__ void rotate(const u16* __restrict__ qkv, const u16* __restrict__ cosines,
                                       const u16* __restrict__ sines, const Rotate a) {
    const int H = a.H, D = a.D, R = a.R;
    const float sign = a.sign;
    const int threads = D / 16, i = blockIdx.x * blockDim.x + threadIdx.x, vector = i / threads;
    if (vector >= a.tokens * H * 3) return;
    const int part = D / R, per_part = part / 16, t = i % threads, k = t / per_part * part + t % per_part * 8;
    const size_t place = (size_t)vector * D + k, angle = (size_t)(vector / 3 / H) * D + k;
    uint4 first = *(const uint4*)(qkv + place), second = *(const uint4*)(qkv + place + part / 2);
    if (vector % 3 < 2) {
        const uint4 c = *(const uint4*)(cosines + angle), s = *(const uint4*)(sines + angle);
        auto turn = [&](u32& a, u32& b, u32 c, u32 s) {
            const u32 was = a;
            a = pack(low(a) * low(c) - low(b) * low(s) * sign, high(a) * high(c) - high(b) * high(s) * sign);
            b = pack(low(b) * low(c) + low(was) * low(s) * sign, high(b) * high(c) + high(was) * high(s) * sign);
        };
        turn(first.x, second.x, c.x, s.x);
        turn(first.y, second.y, c.y, s.y);
        turn(first.z, second.z, c.z, s.z);
        turn(first.w, second.w, c.w, s.w);
    }
    *(uint4*)(a.y + place) = first;
    *(uint4*)(a.y + place + part / 2) = second;
}
extern "C" __global__ void rotate(const Rotate a) { rotate(a.qkv, a.cosines, a.sines, a); }
