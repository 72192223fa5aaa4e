"""CUDA C++ of the GPU kernels, which `kernels_cuda` has compiled for the GPU that runs it.

Letters as there.
"""

from .kernels_cuda_hopper import FEW_ROWS_ON_HOPPER, FEW_SPLITS, FEW_TOKENS, MANY_ROWS, SPLITS, STAGES
from .kernels_cuda_linear import EXPAND, FEW_ROWS, FEW_WIDTHS, ONE_ROW, ROW_KERNEL, ROWS, TILE_SHAPES, TILES

# Types and the two operations that every kernel needs: eight bytes or nibbles to numbers, and a product of 16 × 16
# weights with 16 × 8 activations on the tensor cores. No header is included, which makes NVRTC twice as fast.
_COMMON = r"""
typedef unsigned int u32;
typedef unsigned short u16;   // the bits of a half or a bfloat16

#if BF16
__device__ __forceinline__ float to_float(u16 v) { return __uint_as_float((u32)v << 16); }
__device__ __forceinline__ u16 to_u16(float f) { u16 r; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(f)); return r; }
#else
__device__ __forceinline__ float to_float(u16 v) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v)); return f; }
__device__ __forceinline__ u16 to_u16(float f) { u16 r; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(f)); return r; }
#endif
__device__ __forceinline__ float low(u32 v) { return to_float((u16)v); }
__device__ __forceinline__ float high(u32 v) { return to_float((u16)(v >> 16)); }
__device__ __forceinline__ u32 pack(float a, float b) { return (u32)to_u16(a) | ((u32)to_u16(b) << 16); }

// Programmatic dependent launch: a kernel may start, and read weights, while the one before it still runs; what that
// one wrote may be read only after wait(). Both do nothing in an ordinary launch.
__device__ __forceinline__ void start_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#if __CUDA_ARCH__ >= 750
#define LINE ".L2::128B"   // have the L2 cache fetch whole lines
#else
#define LINE ""
#endif
// 16 bytes that are read once; zeros if they are not inside.
__device__ __forceinline__ uint4 load_stream(const void* p, bool inside = true) {
    uint4 v;
    asm volatile("{ .reg .pred inside; setp.ne.s32 inside, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0;"
        " mov.u32 %3, 0; @inside ld.global.nc.L1::no_allocate" LINE ".v4.u32 {%0,%1,%2,%3}, [%4]; }"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w) : "l"(p), "r"((int)inside));
    return v;
}

// 16 bytes on their way into shared memory, or zeros; on older devices at once.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool inside) {
#if __CUDA_ARCH__ >= 800
    u32 address = (u32)__cvta_generic_to_shared(to);
    int bytes = inside ? 16 : 0;   // the rest is filled with zeros
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
        :: "r"(address), "l"(from), "r"(bytes) : "memory");
#else
    *(uint4*)to = inside ? *(const uint4*)from : make_uint4(0, 0, 0, 0);
#endif
}
__device__ __forceinline__ void commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int LEFT> __device__ __forceinline__ void wait_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" :: "n"(LEFT) : "memory");
#endif
}

__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" :: "l"(p)); }

// Four weights of a word, in order, as two pairs. A byte b in the low bits of 0x6400 is the half 1024 + b.
__device__ __forceinline__ void widen8(u32 w, u32* out) {
#if BF16
    // 0x4300 is 128 with a unit in its last place: seven bits fit, and the sign bit is subtracted as 0 or 128.
    u32 a = __byte_perm(w, 0x43434343, 0x4140), b = __byte_perm(w, 0x43434343, 0x4342);
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out[0]) : "r"(a & 0xff80ff80), "r"(0xbf80bf80), "r"(a & 0xff7fff7f));
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out[1]) : "r"(b & 0xff80ff80), "r"(0xbf80bf80), "r"(b & 0xff7fff7f));
#else
    w ^= 0x80808080;
    u32 a = __byte_perm(w, 0x64646464, 0x4140), b = __byte_perm(w, 0x64646464, 0x4342);
    asm("sub.f16x2 %0, %1, %2;" : "=r"(out[0]) : "r"(a), "r"(0x64806480));
    asm("sub.f16x2 %0, %1, %2;" : "=r"(out[1]) : "r"(b), "r"(0x64806480));
#endif
}
// Eight nibbles of a word, in order (the even column is the high nibble), as four pairs.
__device__ __forceinline__ void widen4(u32 w, u32* out) {
    w ^= 0x88888888;
    const u32 s = w >> 4;
#if BF16
    const u32 magic = 0x43004300;   // 128 + n
#else
    const u32 magic = 0x64006400;   // 1024 + n
#endif
    u32 p[4] = {__byte_perm(s, w, 0x4440), __byte_perm(s, w, 0x5541), __byte_perm(s, w, 0x6662),
                __byte_perm(s, w, 0x7773)};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 v = (p[i] & 0x000f000f) | magic;
#if BF16
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out[i]) : "r"(v), "r"(0x3f803f80), "r"(0xc308c308));
#else
        asm("sub.f16x2 %0, %1, %2;" : "=r"(out[i]) : "r"(v), "r"(0x64086408));
#endif
    }
}

// d[row g, columns 2t, 2t+1], d[row g+8, …] += a · b, g = lane / 4, t = lane % 4. a: pairs of k (row g, 2t), (row g+8,
// 2t), (row g, 2t+8), (row g+8, 2t+8); b: pairs (2t, column g), (2t+8, column g).
#if __CUDA_ARCH__ >= 750
__device__ __forceinline__
#else
__device__ __noinline__   // it is long
#endif
void multiply(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if BF16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
        " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#elif __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
        " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#elif __CUDA_ARCH__ >= 750
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(b0));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a2), "r"(a3), "r"(b1));
#else
    // Volta's tensor cores have another layout: ordinary arithmetic, right but slow. Lane 4c + s has column c of b.
    const int g4 = threadIdx.x & 28, t = threadIdx.x & 3;
#pragma unroll 1
    for (int s = 0; s < 4; s++) {
        u32 r0 = __shfl_sync(~0u, a0, g4 + s), r1 = __shfl_sync(~0u, a1, g4 + s);
        u32 r2 = __shfl_sync(~0u, a2, g4 + s), r3 = __shfl_sync(~0u, a3, g4 + s);
#pragma unroll
        for (int c = 0; c < 2; c++) {
            u32 q0 = __shfl_sync(~0u, b0, (2 * t + c) * 4 + s), q1 = __shfl_sync(~0u, b1, (2 * t + c) * 4 + s);
            d[c] += low(r0) * low(q0) + high(r0) * high(q0) + low(r2) * low(q1) + high(r2) * high(q1);
            d[c + 2] += low(r1) * low(q0) + high(r1) * high(q0) + low(r3) * low(q1) + high(r3) * high(q1);
        }
    }
#endif
}

__device__ __forceinline__ float gelu(float v) {   // the tanh form
    float u = 0.7978845608028654f * v * (1.0f + 0.044715f * v * v);
    return __fdividef(v, 1.0f + __expf(-2.0f * u));
}

// Eight numbers of a row after LayerNorm.
__device__ __forceinline__ uint4 normalised(uint4 x, float mean, float scale, uint4 weight, uint4 bias) {
    auto two = [&](u32 x, u32 weight, u32 bias) {
        return pack((low(x) - mean) * scale * low(weight) + low(bias),
                    (high(x) - mean) * scale * high(weight) + high(bias));
    };
    return make_uint4(two(x.x, weight.x, bias.x), two(x.y, weight.y, bias.y), two(x.z, weight.z, bias.z),
                      two(x.w, weight.w, bias.w));
}

// What becomes of a sum: scale and bias of row n, then GELU, or alpha times a residual. An Operation has these, too.
struct Epilogue {
    const u16* scale;      // [N] or null
    const u16* bias;       // [N] or null
    const u16* residual;   // [M, N] or null
    float alpha;
    int gelu;
    void* output;          // [M, N]
};
struct Finish { u16 scale, bias, residual; };   // not converted yet, so that nobody waits for them
template <class E> __device__ __forceinline__ Finish prepare(const E& e, int m, int n, int M, int N) {
    Finish f = {0, 0, 0};
    if (m < M && n < N) {
        if (e.scale) f.scale = e.scale[n];
        if (e.bias) f.bias = e.bias[n];
        if (e.residual) f.residual = e.residual[(size_t)m * N + n];
    }
    return f;
}
template <class E> __device__ __forceinline__ float finished(const E& e, const Finish& f, float sum) {
    if (e.scale) sum *= to_float(f.scale);
    sum += to_float(f.bias);
    if (e.gelu) sum = gelu(sum);
    return sum + e.alpha * to_float(f.residual);
}
template <class E>
__device__ __forceinline__ void finish(const E& e, const Finish& f, float sum, int m, int n, int N) {
    ((u16*)e.output)[(size_t)m * N + n] = to_u16(finished(e, f, sum));
}
"""

# The small operations of a step of one token for each of B sequences, and of a prompt.
_ATTENTION = r"""
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
template <int D, int AT_ONCE> struct Keys {
    static constexpr int LANES = D / 8, GROUPS = 256 / LANES, AHEAD = GROUPS < AT_ONCE ? AT_ONCE / GROUPS : 1;
    static constexpr int COUNT = GROUPS * AHEAD;   // keys of all threads
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
template <int D> struct AttendShared {
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
    for (int i = 0; i < 8; i++) { my_q[i] = s.q[lane * 8 + i]; acc[i] = 0; }
    auto take = [&](K& keys, int base) {
        float score[AHEAD], top = largest;
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            const int j = base + a * GROUPS + group;
            if (j == n - 1) { keys.k[a] = s.new_key[lane]; keys.v[a] = new_value; }
            const uint4 k = keys.k[a];
            float dot = my_q[0] * low(k.x) + my_q[1] * high(k.x) + my_q[2] * low(k.y) + my_q[3] * high(k.y)
                      + my_q[4] * low(k.z) + my_q[5] * high(k.z) + my_q[6] * low(k.w) + my_q[7] * high(k.w);
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
            acc[0] += p * low(v.x); acc[1] += p * high(v.x); acc[2] += p * low(v.y); acc[3] += p * high(v.y);
            acc[4] += p * low(v.z); acc[5] += p * high(v.z); acc[6] += p * low(v.w); acc[7] += p * high(v.w);
        }
    };
    for (int base = begin; base < end; base += 2 * COUNT) {
        take(first_keys, base);
        first_keys.fetch(op, cut, head, base + 2 * COUNT, end);
        if (base + COUNT >= end) break;
        take(second_keys, base + COUNT);
        second_keys.fetch(op, cut, head, base + 3 * COUNT, end);
    }
    if (lane == 0) { s.sums[group] = sum; s.maxima[group] = largest; }
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
        if (cut.used == 1) out[i] = to_u16(o / total);
        else parts[part_index * D + i] = o;
    }
    if (cut.used == 1) return;
    if (threadIdx.x == 0) heads[part_index] = make_float2(top, total);
    __syncthreads();
    if (threadIdx.x == 0) {   // what the block has written comes before its ticket, and what it reads after
        u32 ticket;
        __threadfence();
        asm volatile("atom.add.relaxed.gpu.global.u32 %0, [%1], 1;" : "=r"(ticket) : "l"(op.tickets + head) : "memory");
        __threadfence();
        s.is_last = ticket == cut.used - 1;
        if (s.is_last) op.tickets[head] = 0;
    }
    __syncthreads();
    if (!s.is_last) return;
    float held[MOST_PARTS];   // on their way while the parts are weighed
#pragma unroll
    for (int p = 0; p < MOST_PARTS; p++)
        held[p] = p < cut.used && threadIdx.x < D ? __ldcg(parts + p * D + threadIdx.x) : 0.0f;
    if (threadIdx.x < 32) {   // a lane a part
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
"""
_STEP_KERNELS = r"""
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
template <int AT_ONCE> __device__ __forceinline__ void attend_all(const Operation& op) {
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
"""
_PROMPT = r"""
// y = LayerNorm(x), a block a row; K % 8 == 0.
extern "C" __global__ void __launch_bounds__(512) layer_norm(const u16* x, const u16* weight, const u16* bias, u16* y,
                                                             float epsilon, int K) {
    extern __shared__ uint4 row[];
    __shared__ float sums[32];
    Operation op = {};
    op.epsilon = epsilon;
    op.K = K;
    start_next();
    for (int i = threadIdx.x; i < K / 8; i += blockDim.x) { prefetch(weight + i * 8); prefetch(bias + i * 8); }
    wait();
    for (int i = threadIdx.x; i < K / 8; i += blockDim.x) row[i] = ((const uint4*)x)[(size_t)blockIdx.x * (K / 8) + i];
    normalise(row, (const uint4*)weight, (const uint4*)bias, op, sums);
    for (int i = threadIdx.x; i < K / 8; i += blockDim.x) ((uint4*)y)[(size_t)blockIdx.x * (K / 8) + i] = row[i];
}

// A prompt's queries, keys and values out of qkv [B, S, H, 3·D], rotated by cosines and sines [B, S, D]:
// queries [B, S, H, D] and, into the places from `place` on, caches [B, H, T, D]. A thread for 8 numbers; D % 16 == 0.
extern "C" __global__ void split_rotate(const u16* __restrict__ qkv, const u16* __restrict__ cosines,
        const u16* __restrict__ sines, u16* queries, u16* keys, u16* values, int B, int S, int H, int D, int R, int T,
        int place) {
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
    const size_t head = (size_t)b * H + h, to = (head * T + place + s) * D + k;
    *(uint4*)(queries + (token * H + h) * D + k) = *(uint4*)q;
    *(uint4*)(keys + to) = *(uint4*)key;
    *(uint4*)(values + to) = *(const uint4*)(mine + 2 * D + k);
}

// qkv [tokens, H, 3·D] with queries and keys rotated by cosines and sines [tokens, D], which are the same in both
// halves of each of R parts; back with sign -1. A thread for 8 numbers of each half; D / R % 16 == 0.
extern "C" __global__ void rotate(const u16* __restrict__ qkv, const u16* __restrict__ cosines,
        const u16* __restrict__ sines, u16* out, float sign, int tokens, int H, int D, int R) {
    const int threads = D / 16, i = blockIdx.x * blockDim.x + threadIdx.x, vector = i / threads;
    if (vector >= tokens * H * 3) return;
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
        turn(first.x, second.x, c.x, s.x); turn(first.y, second.y, c.y, s.y);
        turn(first.z, second.z, c.z, s.z); turn(first.w, second.w, c.w, s.w);
    }
    *(uint4*)(out + place) = first;
    *(uint4*)(out + place + part / 2) = second;
}
"""

# LayerNorm in training under autocast: a row is float32, the LayerNorm's result too, and what a product takes of it is
# rounded to 16 bits. A block a row of K numbers, K % 8 == 0; a thread has every 512th eight of them, at most MOST.
_TRAINING = r"""
__device__ __forceinline__ void load8(const void* p, size_t i, bool is_float, float (&v)[8]) {
    if (is_float) {
        const float4 a = ((const float4*)p)[2 * i], b = ((const float4*)p)[2 * i + 1];
        v[0] = a.x; v[1] = a.y; v[2] = a.z; v[3] = a.w; v[4] = b.x; v[5] = b.y; v[6] = b.z; v[7] = b.w;
    } else {
        const uint4 a = ((const uint4*)p)[i];
        v[0] = low(a.x); v[1] = high(a.x); v[2] = low(a.y); v[3] = high(a.y);
        v[4] = low(a.z); v[5] = high(a.z); v[6] = low(a.w); v[7] = high(a.w);
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

// A row of x, its mean and the inverse of its standard deviation; `sums` has room for 32.
template <int MOST> struct Row {
    float v[MOST][8], mean, scale;
    __device__ __forceinline__ Row(const void* x, size_t row, bool is_float, float epsilon, int K, float* sums) {
        float sum = 0;
#pragma unroll
        for (int j = 0; j < MOST; j++) {
            const int i = threadIdx.x + j * 512;
            if (i >= K / 8) break;
            load8(x, row + i, is_float, v[j]);
#pragma unroll
            for (int e = 0; e < 8; e++) sum += v[j][e];
        }
        mean = block_sum(sum, sums) / K;
        sum = 0;
#pragma unroll
        for (int j = 0; j < MOST; j++) {
            if (threadIdx.x + j * 512 >= K / 8) break;
#pragma unroll
            for (int e = 0; e < 8; e++) sum += (v[j][e] - mean) * (v[j][e] - mean);
        }
        scale = rsqrtf(block_sum(sum, sums + 16) / K + epsilon);
    }
};

// y and `rounded`: LayerNorm of x.
template <int MOST>
__device__ __forceinline__ void norm_forward(const void* x, const void* weight, const void* bias, float* y,
        u16* rounded, float epsilon, bool x_is_float, bool weight_is_float, int K) {
    __shared__ float sums[32];
    const size_t row = (size_t)blockIdx.x * (K / 8);
    Row<MOST> r(x, row, x_is_float, epsilon, K, sums);
#pragma unroll
    for (int j = 0; j < MOST; j++) {
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

// The gradient of x, for those of y and of `rounded`.
template <int MOST>
__device__ __forceinline__ void norm_backward(const void* x, const void* weight, const float* grad_y,
        const u16* grad_rounded, void* grad_x, float epsilon, bool x_is_float, bool weight_is_float, int K) {
    __shared__ float sums[64];
    const size_t row = (size_t)blockIdx.x * (K / 8);
    Row<MOST> r(x, row, x_is_float, epsilon, K, sums);
    float g[MOST][8], sum = 0, product = 0;
#pragma unroll
    for (int j = 0; j < MOST; j++) {
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
    for (int j = 0; j < MOST; j++) {
        const int i = threadIdx.x + j * 512;
        if (i >= K / 8) break;
#pragma unroll
        for (int e = 0; e < 8; e++) g[j][e] = (g[j][e] - sum - r.v[j][e] * product) * r.scale;
        store8(grad_x, row + i, x_is_float, g[j]);
    }
}
#define NORMS(MOST) \
extern "C" __global__ void __launch_bounds__(512, 4 / MOST) norm_forward_##MOST(const void* x, const void* weight, \
        const void* bias, float* y, u16* rounded, float epsilon, int x_is_float, int weight_is_float, int K) { \
    norm_forward<MOST>(x, weight, bias, y, rounded, epsilon, x_is_float, weight_is_float, K); \
} \
extern "C" __global__ void __launch_bounds__(512, MOST == 1 ? 3 : 1) norm_backward_##MOST(const void* x, \
        const void* weight, const float* grad_y, const u16* grad_rounded, void* grad_x, float epsilon, \
        int x_is_float, int weight_is_float, int K) { \
    norm_backward<MOST>(x, weight, grad_y, grad_rounded, grad_x, epsilon, x_is_float, weight_is_float, K); \
}
NORMS(1) NORMS(2) NORMS(4)
"""

HEAD_DIMS = (16, 32, 64, 128)
MOST_PARTS = 8  # into which the keys of a head are cut
SOURCES = {
    "prompt": _COMMON + ONE_ROW + EXPAND + _PROMPT,
    "training": _COMMON + ONE_ROW + _TRAINING,
}
for _bits in (8, 4, 16):
    SOURCES[f"row_{_bits}"] = _COMMON + ONE_ROW + ROW_KERNEL + f"ROW({_bits})\n"
for _bits, _height in ((8, 1), (4, 2)):
    SOURCES[f"rows_{_bits}"] = _COMMON + ONE_ROW + ROWS + f"ROWS(rows_{_bits}, {_bits}, {_height})\n"
for _head_dim in HEAD_DIMS:
    _defined = f"#define HEAD_DIM {_head_dim}\n#define MOST_PARTS {MOST_PARTS}\n"
    SOURCES[f"step_{_head_dim}"] = _defined + _COMMON + ONE_ROW + _ATTENTION + _STEP_KERNELS
for (_bits, _width), (_height, _stages, _blocks) in TILE_SHAPES.items():  # modules of their own: few are ever needed
    _name = f"tiles_{_bits}_{_width}"
    SOURCES[_name] = _COMMON + TILES + f"TILES({_name}, {_bits}, {_width}, {_height}, {_stages}, {_blocks})\n"
for _width in FEW_WIDTHS:
    for _bits in (8, 4):
        SOURCES[f"few_{_bits}_{_width}"] = _COMMON + FEW_ROWS + f"FEW_ROWS({_bits}, {_width})\n"
for _tokens, _stages in STAGES.items():
    for _split in SPLITS:
        _shape = f"{_tokens}, {_split}, {_stages}"
        for _bits in (8, 4):
            SOURCES[f"hopper_{_bits}_{_tokens}_{_split}"] = _COMMON + MANY_ROWS + f"MANY_ROWS({_bits}, {_shape})\n"
        SOURCES[f"hopper_gradient_{_tokens}_{_split}"] = _COMMON + MANY_ROWS + f"GRADIENT({_shape})\n"
for _tokens in FEW_TOKENS:
    for _split in FEW_SPLITS:
        for _bits in (8, 4):
            _kernel = f"FEW_ROWS({_bits}, {_tokens}, {_split})\n"
            SOURCES[f"hopper_few_{_bits}_{_tokens}_{_split}"] = _COMMON + MANY_ROWS + FEW_ROWS_ON_HOPPER + _kernel
