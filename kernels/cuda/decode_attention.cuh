// Attention of a decoding step, one token for each of B sequences. Module: step_HEAD_DIM, with step.cuh.
//
// Shapes: qkv, not rotated; caches filled before slots. Grid: (parts of the keys, B * H); block: 256. Alignment: qkv
//   and the caches to 16 bytes.
// Pipeline: D / 8 threads share a key. Each thread keeps two tiles of keys and values in registers, one loading while
//   the other is used, with an online softmax.
// Split of keys: up to MAX_PARTS parts a head; the last block of a head to arrive combines them. arrivals: zeros [B *
//   H], left as zeros. Source: Flash-Decoding (Dao et al., 2023).
#pragma once

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/step.cuh"

constexpr int D = HEAD_DIM, LANES = D / 8, GROUPS = 256 / LANES;  // LANES threads share a key
static_assert(D % 8 == 0 && D <= 256 && (LANES & (LANES - 1)) == 0 && LANES <= 32 && MAX_PARTS <= 32, "");

struct DecodeAttention {
    const u16* qkv;                // [B, H, 3, D]
    const float *cosines, *sines;  // [B, D]
    u16 *keys, *values;            // [B, H, T, D]
    const int *slots, *padding;    // [B]
    u16* y;                        // [B, H, D]
    float* partials;               // [B * H, max_parts, D + 2]
    u32* arrivals;
    int H, T, R, prefix, max_parts;
};

// Split of n keys, the new one included, into parts. It depends on n, not on T: the same sequence has the same sums.
struct KeySplit {
    int n, per, used;
    __device__ __forceinline__ KeySplit(const DecodeAttention& a, int b) {
        n = a.slots[b] + 1;
        per = max(64, (n + 16 * a.max_parts - 1) / (16 * a.max_parts) * 16);
        used = (n + per - 1) / per;
    }
};
// Keys and values in registers.
template <int KEYS_IN_FLIGHT>
struct KeyTile {
    static constexpr int PER_THREAD = GROUPS < KEYS_IN_FLIGHT ? KEYS_IN_FLIGHT / GROUPS : 1;
    static constexpr int COUNT = GROUPS * PER_THREAD;  // keys of the block
    uint4 k[PER_THREAD], v[PER_THREAD];
    __device__ __forceinline__ void fetch(const DecodeAttention& a, const KeySplit& split, int head, int base,
                                          int end) {
        const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
#pragma unroll
        for (int p = 0; p < PER_THREAD; p++) {
            const int j = base + p * GROUPS + group;
            const size_t place = ((size_t)head * a.T + j) * LANES + lane;
            k[p] = v[p] = make_uint4(0, 0, 0, 0);
            if (j < end && j < split.n - 1) {
                k[p] = ((const uint4*)a.keys)[place];
                v[p] = ((const uint4*)a.values)[place];
            }
        }
    }
};
struct AttendShared {
    float q[D], sums[GROUPS], maxima[GROUPS], outs[GROUPS][D], weights[32];
    uint4 new_key[D / 8];
    bool is_last;
};

// One part of the keys of a head: rotates query and key, stores key and value at the slot, attends to the keys up to
// it, without padding (prefix <= j < prefix + padding[b]), and combines the parts. Both tiles are loaded or loading.
template <int KEYS_IN_FLIGHT>
__device__ __forceinline__ void attend(const DecodeAttention& a, const KeySplit& split, int head, int part_index,
                                       KeyTile<KEYS_IN_FLIGHT>& first_keys, KeyTile<KEYS_IN_FLIGHT>& second_keys,
                                       AttendShared& s) {
    using K = KeyTile<KEYS_IN_FLIGHT>;
    constexpr int PER_THREAD = K::PER_THREAD, COUNT = K::COUNT;
    const int b = head / a.H, lane = threadIdx.x % LANES, group = threadIdx.x / LANES, n = split.n;
    const int begin = part_index * split.per, end = min(begin + split.per, n), padding_end = a.prefix + a.padding[b];
    const u16* mine = a.qkv + (size_t)head * 3 * D;
    for (int i = threadIdx.x; i < D; i += blockDim.x) {
        const int half = D / a.R / 2;
        const bool first = i % (2 * half) < half;
        const int other = first ? i + half : i - half;
        const float c = a.cosines[b * D + i], t = first ? -a.sines[b * D + i] : a.sines[b * D + i];
        s.q[i] = to_float(to_u16(to_float(mine[i]) * c + to_float(mine[other]) * t)) * rsqrtf((float)D);
        ((u16*)s.new_key)[i] = to_u16(to_float(mine[D + i]) * c + to_float(mine[D + other]) * t);
    }
    const uint4 new_value = ((const uint4*)(mine + 2 * D))[lane];
    __syncthreads();
    if (end == n && group == 0) {
        const size_t place = ((size_t)head * a.T + n - 1) * LANES + lane;
        ((uint4*)a.keys)[place] = s.new_key[lane];
        ((uint4*)a.values)[place] = new_value;
    }
    float my_q[8], acc[8], running_max = -1e30f, sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        my_q[i] = s.q[lane * 8 + i];
        acc[i] = 0;
    }
    auto accumulate = [&](K& keys, int base) {
        float score[PER_THREAD], top = running_max;
#pragma unroll
        for (int p = 0; p < PER_THREAD; p++) {
            const int j = base + p * GROUPS + group;
            if (j == n - 1) {
                keys.k[p] = s.new_key[lane];
                keys.v[p] = new_value;
            }
            const uint4 k = keys.k[p];
            float dot = my_q[0] * low(k.x) + my_q[1] * high(k.x) + my_q[2] * low(k.y) + my_q[3] * high(k.y) +
                        my_q[4] * low(k.z) + my_q[5] * high(k.z) + my_q[6] * low(k.w) + my_q[7] * high(k.w);
#pragma unroll
            for (int i = LANES / 2; i; i /= 2) dot += __shfl_xor_sync(~0u, dot, i);
            score[p] = j < end && (j < a.prefix || j >= padding_end) ? dot : -1e30f;
            top = fmaxf(top, score[p]);
        }
        const float shrink = __expf(running_max - top);
        running_max = top;
        sum *= shrink;
#pragma unroll
        for (int i = 0; i < 8; i++) acc[i] *= shrink;
#pragma unroll
        for (int p = 0; p < PER_THREAD; p++) {
            const float w = score[p] > -1e29f ? __expf(score[p] - top) : 0.0f;
            const uint4 v = keys.v[p];
            sum += w;
            acc[0] += w * low(v.x);
            acc[1] += w * high(v.x);
            acc[2] += w * low(v.y);
            acc[3] += w * high(v.y);
            acc[4] += w * low(v.z);
            acc[5] += w * high(v.z);
            acc[6] += w * low(v.w);
            acc[7] += w * high(v.w);
        }
    };
    for (int base = begin; base < end; base += 2 * COUNT) {
        accumulate(first_keys, base);
        first_keys.fetch(a, split, head, base + 2 * COUNT, end);
        if (base + COUNT >= end) break;
        accumulate(second_keys, base + COUNT);
        second_keys.fetch(a, split, head, base + 3 * COUNT, end);
    }
    if (lane == 0) {
        s.sums[group] = sum;
        s.maxima[group] = running_max;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) s.outs[group][lane * 8 + i] = acc[i];
    __syncthreads();
    float top = -1e30f, total = 0;
    for (int i = 0; i < GROUPS; i++) top = fmaxf(top, s.maxima[i]);
    for (int i = 0; i < GROUPS; i++) total += s.sums[i] * __expf(s.maxima[i] - top);
    // partials: of every part, D sums of values; then its maximum score and its sum of weights.
    u16* out = a.y + (size_t)head * D;
    float* partials = a.partials + (size_t)head * a.max_parts * (D + 2);
    float2* heads = (float2*)(partials + a.max_parts * D);
    for (int i = threadIdx.x; i < D; i += blockDim.x) {
        float o = 0;
#pragma unroll 16
        for (int j = 0; j < GROUPS; j++) o += s.outs[j][i] * __expf(s.maxima[j] - top);
        if (split.used == 1)
            out[i] = to_u16(o / total);
        else
            partials[part_index * D + i] = o;
    }
    if (split.used == 1) return;
    if (threadIdx.x == 0) heads[part_index] = make_float2(top, total);
    __syncthreads();
    if (threadIdx.x == 0) {  // release the block's partials; acquire the others'
        u32 arrival;
        __threadfence();
        asm volatile("atom.add.relaxed.gpu.global.u32 %0, [%1], 1;"
                     : "=r"(arrival)
                     : "l"(a.arrivals + head)
                     : "memory");
        __threadfence();
        s.is_last = arrival == split.used - 1;
        if (s.is_last) a.arrivals[head] = 0;
    }
    __syncthreads();
    if (!s.is_last) return;
    float held[MAX_PARTS];  // loading while the weights of the parts are computed
#pragma unroll
    for (int p = 0; p < MAX_PARTS; p++)
        held[p] = p < split.used && threadIdx.x < D ? __ldcg(partials + p * D + threadIdx.x) : 0.0f;
    if (threadIdx.x < 32) {  // a lane for each part
        const float2 h = threadIdx.x < split.used ? __ldcg(heads + threadIdx.x) : make_float2(-1e30f, 0.0f);
        float max_of_parts = h.x;
#pragma unroll
        for (int i = 16; i; i /= 2) max_of_parts = fmaxf(max_of_parts, __shfl_xor_sync(~0u, max_of_parts, i));
        const float w = __expf(h.x - max_of_parts);
        float all = h.y * w;
#pragma unroll
        for (int i = 16; i; i /= 2) all += __shfl_xor_sync(~0u, all, i);
        s.weights[threadIdx.x] = w / all;
    }
    __syncthreads();
    if (threadIdx.x >= D) return;
    float o = 0;
#pragma unroll
    for (int p = 0; p < MAX_PARTS; p++) o += held[p] * s.weights[p];
    out[threadIdx.x] = to_u16(o);
}

// Slots and older keys precede the step, so they are read before pdl_wait. attend_many has fewer keys in flight and
// twice as many blocks on a multiprocessor.
template <int KEYS_IN_FLIGHT>
__device__ __forceinline__ void attend_all(const DecodeAttention& a) {
    __shared__ AttendShared shared;
    pdl_launch_dependents();
    const KeySplit split(a, blockIdx.y / a.H);
    if (blockIdx.x >= split.used) return;
    KeyTile<KEYS_IN_FLIGHT> first, second;
    const int begin = blockIdx.x * split.per, end = min(begin + split.per, split.n);
    first.fetch(a, split, blockIdx.y, begin, end);
    second.fetch(a, split, blockIdx.y, begin + first.COUNT, end);
    pdl_wait();
    attend(a, split, blockIdx.y, blockIdx.x, first, second, shared);
}
extern "C" __global__ void __launch_bounds__(256) attend_step(const __grid_constant__ DecodeAttention a) {
    attend_all<64>(a);
}
extern "C" __global__ void __launch_bounds__(256, 4) attend_many(const __grid_constant__ DecodeAttention a) {
    attend_all<32>(a);
}
