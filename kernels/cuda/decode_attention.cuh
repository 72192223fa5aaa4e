// The small operations of a decoding step of one token for each of B sequences.
#pragma once

#include "kernels/cuda/operation.cuh"

// Begins a step: the embedding of ids [B] -> hidden [B, N]; cosines and sines [B, D] of positions [B, R], rounded as
// the model's dtype rounds them. A block a sequence, `b`.
template <int D>
__device__ __forceinline__ void begin(const Operation& op, int b) {
    const u16* row = (const u16*)op.weight + ((const long long*)op.input)[b] * op.N;
    for (int k = threadIdx.x * 8; k < op.N; k += blockDim.x * 8)
        *(uint4*)((u16*)op.output + (size_t)b * op.N + k) = *(const uint4*)(row + k);
    for (int i = threadIdx.x; i < D; i += blockDim.x) {
        const int part = D / op.R;
        const float position = (float)op.positions[b * op.R + i / part], frequency = op.frequencies[i % (part / 2)];
#if BF16
        const float angle = position * frequency;
#else
        const float angle = to_float(to_u16(to_float(to_u16(position)) * frequency));
#endif
        op.cosines[b * D + i] = to_float(to_u16(cosf(angle)));
        op.sines[b * D + i] = to_float(to_u16(sinf(angle)));
    }
}
// Ends it: the N = B * R positions move on, and so do the slots. One block.
__device__ __forceinline__ void end(const Operation& op) {
    for (int i = threadIdx.x; i < op.N; i += blockDim.x) op.positions[i] += op.advance[i];
    for (int i = threadIdx.x; i < op.N / op.R; i += blockDim.x) op.slots[i] += 1;
}

// How the n keys, the new one among them, are cut into parts for several blocks. It depends on their number, not on T,
// so that the same question gets the same sums.
struct Cut {
    int n, per, used;
    __device__ __forceinline__ Cut(const Operation& op, int b) {
        n = op.slots[b] + 1;
        per = max(64, (n + 16 * op.most - 1) / (16 * op.most) * 16);
        used = (n + per - 1) / per;
    }
};
// Keys and values that a thread has loaded; D / 8 threads share a key.
template <int D, int AT_ONCE>
struct Keys {
    static constexpr int LANES = D / 8, GROUPS = 256 / LANES, AHEAD = GROUPS < AT_ONCE ? AT_ONCE / GROUPS : 1;
    static constexpr int COUNT = GROUPS * AHEAD;  // keys of all threads
    uint4 k[AHEAD], v[AHEAD];
    __device__ __forceinline__ void fetch(const Operation& op, const Cut& cut, int head, int base, int end) {
        const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            const int j = base + a * GROUPS + group;
            const size_t place = ((size_t)head * op.T + j) * LANES + lane;
            k[a] = v[a] = make_uint4(0, 0, 0, 0);
            if (j < end && j < cut.n - 1) {
                k[a] = ((const uint4*)op.keys)[place];
                v[a] = ((const uint4*)op.values)[place];
            }
        }
    }
};
template <int D>
struct AttendShared {
    static constexpr int GROUPS = 256 / (D / 8);
    float q[D], sums[GROUPS], maxima[GROUPS], outs[GROUPS][D], weights[32];
    uint4 new_key[D / 8];
    bool is_last;
};

// One part of the keys for the query of one head of B * H: rotates query and key, stores key and value at the slot, and
// attends to the keys up to there but those of the padding (prefix <= j < prefix + padding[b]). The last block of a
// head adds up its parts. The first keys of the part, older ones, are loaded already; the next are, always, while some
// are worked on.
template <int D, int AT_ONCE>
__device__ __forceinline__ void attend(const Operation& op, const Cut& cut, int head, int part_index,
                                       Keys<D, AT_ONCE>& first_keys, Keys<D, AT_ONCE>& second_keys,
                                       AttendShared<D>& s) {
    using K = Keys<D, AT_ONCE>;
    constexpr int LANES = K::LANES, GROUPS = K::GROUPS, AHEAD = K::AHEAD, COUNT = K::COUNT;
    const int b = head / op.H, lane = threadIdx.x % LANES, group = threadIdx.x / LANES, n = cut.n;
    const int begin = part_index * cut.per, end = min(begin + cut.per, n), hidden_to = op.prefix + op.padding[b];
    const u16* mine = (const u16*)op.input + (size_t)head * 3 * D;
    for (int i = threadIdx.x; i < D; i += blockDim.x) {
        const int half = D / op.R / 2;
        const bool first = i % (2 * half) < half;
        const int other = first ? i + half : i - half;
        const float c = op.cosines[b * D + i], t = first ? -op.sines[b * D + i] : op.sines[b * D + i];
        s.q[i] = to_float(to_u16(to_float(mine[i]) * c + to_float(mine[other]) * t)) * rsqrtf((float)D);
        ((u16*)s.new_key)[i] = to_u16(to_float(mine[D + i]) * c + to_float(mine[D + other]) * t);
    }
    const uint4 new_value = ((const uint4*)(mine + 2 * D))[lane];
    __syncthreads();
    if (end == n && group == 0) {
        const size_t place = ((size_t)head * op.T + n - 1) * LANES + lane;
        ((uint4*)op.keys)[place] = s.new_key[lane];
        ((uint4*)op.values)[place] = new_value;
    }
    float my_q[8], acc[8], largest = -1e30f, sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        my_q[i] = s.q[lane * 8 + i];
        acc[i] = 0;
    }
    auto take = [&](K& keys, int base) {
        float score[AHEAD], top = largest;
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            const int j = base + a * GROUPS + group;
            if (j == n - 1) {
                keys.k[a] = s.new_key[lane];
                keys.v[a] = new_value;
            }
            const uint4 k = keys.k[a];
            float dot = my_q[0] * low(k.x) + my_q[1] * high(k.x) + my_q[2] * low(k.y) + my_q[3] * high(k.y) +
                        my_q[4] * low(k.z) + my_q[5] * high(k.z) + my_q[6] * low(k.w) + my_q[7] * high(k.w);
#pragma unroll
            for (int i = LANES / 2; i; i /= 2) dot += __shfl_xor_sync(~0u, dot, i);
            score[a] = j < end && (j < op.prefix || j >= hidden_to) ? dot : -1e30f;
            top = fmaxf(top, score[a]);
        }
        const float shrink = __expf(largest - top);
        largest = top;
        sum *= shrink;
#pragma unroll
        for (int i = 0; i < 8; i++) acc[i] *= shrink;
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            const float p = score[a] > -1e29f ? __expf(score[a] - top) : 0.0f;
            const uint4 v = keys.v[a];
            sum += p;
            acc[0] += p * low(v.x);
            acc[1] += p * high(v.x);
            acc[2] += p * low(v.y);
            acc[3] += p * high(v.y);
            acc[4] += p * low(v.z);
            acc[5] += p * high(v.z);
            acc[6] += p * low(v.w);
            acc[7] += p * high(v.w);
        }
    };
    for (int base = begin; base < end; base += 2 * COUNT) {
        take(first_keys, base);
        first_keys.fetch(op, cut, head, base + 2 * COUNT, end);
        if (base + COUNT >= end) break;
        take(second_keys, base + COUNT);
        second_keys.fetch(op, cut, head, base + 3 * COUNT, end);
    }
    if (lane == 0) {
        s.sums[group] = sum;
        s.maxima[group] = largest;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) s.outs[group][lane * 8 + i] = acc[i];
    __syncthreads();
    float top = -1e30f, total = 0;
    for (int i = 0; i < GROUPS; i++) top = fmaxf(top, s.maxima[i]);
    for (int i = 0; i < GROUPS; i++) total += s.sums[i] * __expf(s.maxima[i] - top);
    // Of every part: D sums of values; and beside all of them, its largest score and its sum of weights.
    u16* out = (u16*)op.output + (size_t)head * D;
    float* parts = op.parts + (size_t)head * op.most * (D + 2);
    float2* heads = (float2*)(parts + op.most * D);
    for (int i = threadIdx.x; i < D; i += blockDim.x) {
        float o = 0;
#pragma unroll 16
        for (int j = 0; j < GROUPS; j++) o += s.outs[j][i] * __expf(s.maxima[j] - top);
        if (cut.used == 1)
            out[i] = to_u16(o / total);
        else
            parts[part_index * D + i] = o;
    }
    if (cut.used == 1) return;
    if (threadIdx.x == 0) heads[part_index] = make_float2(top, total);
    __syncthreads();
    if (threadIdx.x == 0) {  // what the block has written comes before its ticket, and what it reads after
        u32 ticket;
        __threadfence();
        asm volatile("atom.add.relaxed.gpu.global.u32 %0, [%1], 1;" : "=r"(ticket) : "l"(op.tickets + head) : "memory");
        __threadfence();
        s.is_last = ticket == cut.used - 1;
        if (s.is_last) op.tickets[head] = 0;
    }
    __syncthreads();
    if (!s.is_last) return;
    float held[MOST_PARTS];  // on their way while the parts are weighed
#pragma unroll
    for (int p = 0; p < MOST_PARTS; p++)
        held[p] = p < cut.used && threadIdx.x < D ? __ldcg(parts + p * D + threadIdx.x) : 0.0f;
    if (threadIdx.x < 32) {  // a lane a part
        const float2 h = threadIdx.x < cut.used ? __ldcg(heads + threadIdx.x) : make_float2(-1e30f, 0.0f);
        float largest_part = h.x;
#pragma unroll
        for (int i = 16; i; i /= 2) largest_part = fmaxf(largest_part, __shfl_xor_sync(~0u, largest_part, i));
        const float w = __expf(h.x - largest_part);
        float all = h.y * w;
#pragma unroll
        for (int i = 16; i; i /= 2) all += __shfl_xor_sync(~0u, all, i);
        s.weights[threadIdx.x] = w / all;
    }
    __syncthreads();
    if (threadIdx.x >= D) return;
    float o = 0;
#pragma unroll
    for (int p = 0; p < MOST_PARTS; p++) o += held[p] * s.weights[p];
    out[threadIdx.x] = to_u16(o);
}

extern "C" __global__ void begin_step(const __grid_constant__ Operation op) {
    start_next();
    wait();
    begin<HEAD_DIM>(op, blockIdx.x);
}
extern "C" __global__ void end_step(const __grid_constant__ Operation op) {
    start_next();
    wait();
    end(op);
}
// Grid: parts of the keys, at most; heads. Slots and older keys were there before the step began. `attend_many` has
// fewer keys ahead, and twice as many blocks on a multiprocessor.
template <int AT_ONCE>
__device__ __forceinline__ void attend_all(const Operation& op) {
    __shared__ AttendShared<HEAD_DIM> shared;
    start_next();
    const Cut cut(op, blockIdx.y / op.H);
    if (blockIdx.x >= cut.used) return;
    Keys<HEAD_DIM, AT_ONCE> first, second;
    const int begin = blockIdx.x * cut.per, end = min(begin + cut.per, cut.n);
    first.fetch(op, cut, blockIdx.y, begin, end);
    second.fetch(op, cut, blockIdx.y, begin + first.COUNT, end);
    wait();
    attend<HEAD_DIM>(op, cut, blockIdx.y, blockIdx.x, first, second, shared);
}
extern "C" __global__ void __launch_bounds__(256) attend_step(const __grid_constant__ Operation op) {
    attend_all<64>(op);
}
extern "C" __global__ void __launch_bounds__(256, 4) attend_many(const __grid_constant__ Operation op) {
    attend_all<32>(op);
}
