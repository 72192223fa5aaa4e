"""CUDA C++ of products of several rows with quantised weights on Hopper (sm_90a), a part of `kernels_cuda_source`.

Letters as in `kernels_cuda`.
"""


def _multiply(tokens: int) -> str:
    """The instruction that multiplies 64 weight rows by so many rows of x, 16 columns of each."""
    count = tokens // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(sums[{i}])' for i in range(count))
    a = ", ".join(f"%{count + i}" for i in range(4))
    return rf"""
__device__ __forceinline__ void multiply_async(float (&sums)[{count}], const u32* a, unsigned long long b) {{
    asm volatile("wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32." TYPE "." TYPE
        " {{{sums}}}, {{{a}}}, %{count + 4}, 1, 1, 1, 0;"
        : {outputs} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}}"""


# Of the modules hopper_…_TOKENS_SPLIT: steps under way at a time, by TOKENS; and SPLIT.
STAGES = {64: 8, 128: 8, 192: 6, 256: 5}
SPLITS = (1, 2)
# The same of the modules hopper_few_…, of which a launch says how many steps are under way.
FEW_TOKENS = (8, 16, 32)
FEW_SPLITS = (1, 2, 3)  # clusters of four leave many multiprocessors alone
MOST_STAGES = 10


def hopper_bytes(tokens: int, weight_bytes: int) -> int:
    """Dynamic shared memory of a block, with so many bytes of weights in a step."""
    stage = tokens * 128 + weight_bytes + 128  # the last are scales, where a step needs them
    return 1024 + STAGES[tokens] * stage + 8 * 1536  # STAGING of each warp


def few_bytes(tokens: int, split: int, stages: int, weight_bytes: int) -> int:
    """Dynamic shared memory of a block that multiplies few rows: as above, and sums of the blocks of a cluster."""
    return 1024 + stages * (tokens * 256 + weight_bytes) + (split > 1) * split * -(-8 // split) * tokens * 64


# A block has tiles of 128 columns of y and TOKENS rows, one after the other and, as one of SPLIT blocks of a cluster, a
# part of K. Two warps have the copy engine bring 64 columns of the weight and of x at a time, up to STAGES steps ahead
# and for the block's next tile, too. Of the two warpgroups beside theirs each takes 64 columns of y: a thread reads the
# weights of its fragments from shared memory and widens them in registers, while the tensor cores multiply those before
# by x, which they read from shared memory.
#
# `many_rows` reads weights 2 bytes (INT4: 1) at a time, as its fragments have them. `gradient` multiplies by the weight
# itself: its fragments are columns of what is stored, of which pairs of bytes come transposed, and each number is
# multiplied by the scale of its row.
#
# Grid: as many blocks as tiles, or less; SPLIT times as many as tiles, if K is cut. Block: 384. Tensor maps of bytes: x
# with boxes of TOKENS rows of 128 bytes; the weight with 128 rows of 64 bytes (INT4: 32), or for `gradient` 64 rows of
# 128; all swizzled. N is a multiple of 8, and there is a step for each of SPLIT blocks.
MANY_ROWS = (
    r"""
#if BF16
#define TYPE "bf16"
#else
#define TYPE "f16"
#endif
struct __align__(64) TensorMap { char bytes[128]; };
// What a kernel is given; see `kernels_cuda._CALL`.
struct Call {
    TensorMap weight, x;
    const u16 *scale, *bias, *residual;
    u16* y;
    float alpha;
    int gelu, M, N, K;
    int stages;   // of few rows
    int wide;     // of many rows: residual and y are float32; what is added to the residual is rounded before
};

__device__ __forceinline__ u32 address_of(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Barriers in shared memory, by address. A phase ends after `count` arrivals and the arrival of all announced bytes.
__device__ __forceinline__ void init_barrier(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}
__device__ __forceinline__ void announce(u32 barrier, u32 bytes) {   // and arrive
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait_for(u32 barrier, u32 parity) {   // the end of a phase of this parity
    asm volatile("{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;"
        " @!done bra again; }" :: "r"(barrier), "r"(parity) : "memory");
}
__device__ __forceinline__ void copy_bytes(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        :: "r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
// The box of a tensor map that begins at (byte, row), zeros beyond the tensor's edges.
__device__ __forceinline__ void copy_box(u32 to, const TensorMap& map, int byte, int row, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4}], [%2];"
        :: "r"(to), "l"(&map), "r"(barrier), "r"(byte), "r"(row) : "memory");
}

__device__ __forceinline__ void prefetch_box(const TensorMap& map, int byte, int row) {   // into the L2 cache
    asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];"
        :: "l"(&map), "r"(byte), "r"(row) : "memory");
}

// 16 columns of rows of 128 swizzled bytes, for the tensor cores; 1024 bytes lead from 8 rows to the next 8.
__device__ __forceinline__ unsigned long long describe(u32 address) {
    return (address & 0x3ffff) >> 4 | 1ull << 16 | (1024ull >> 4) << 32 | 1ull << 62;
}
// sums += a · b, later. a, for 64 weight rows, and sums as of `multiply`, a warp having 16 rows; b: `describe`.
"""
    + "".join(_multiply(tokens) for tokens in STAGES)
    + r"""
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(LEFT) : "memory");
}

__device__ __forceinline__ uint4 shared_uint4(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
    return v;
}
__device__ __forceinline__ uint2 shared_uint2(u32 address) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
    return v;
}
__device__ __forceinline__ u32 shared_u16(u32 address) {
    u16 v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address));
    return v;
}
__device__ __forceinline__ u32 shared_u8(u32 address) {
    u32 v;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(address));
    return v;
}
__device__ __forceinline__ u32 shared_u32(u32 address) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
    return v;
}
// Four matrices of 8 × 8 pairs of bytes, transposed; each lane gives the address of a row, 16 bytes.
__device__ __forceinline__ void shared_transposed(u32 address, u32* v) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(address));
}
__device__ __forceinline__ u32 times(u32 a, u32 b) {   // two numbers
    u32 c;
    asm("mul.rn." TYPE "x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}
// Two times two matrices of 8 rows × 8 columns, transposed: each lane gives the address of a column.
__device__ __forceinline__ void store_transposed(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
        :: "r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
// Between the blocks of a cluster: what they stored before they arrived is there after the wait.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
__device__ __forceinline__ void store_to(u32 address, int block, const float* v) {   // of the cluster; 16 bytes
    asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;"
        " st.shared::cluster.v4.f32 [there], {%2, %3, %4, %5}; }"
        :: "r"(address), "r"(block), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]) : "memory");
}

constexpr int ROWS = 128, WARPS = 8;   // columns of y; warps that multiply
constexpr int PITCH = 48, STAGING = 32 * PITCH;   // bytes from token to token and of a warp, in the end

// Barriers of each stage of a ring: `full` when weights and x are there, `free` when so many have left it.
__device__ __forceinline__ void init_ring(u32 full, u32 free, const int& stages, u32 leaving = WARPS) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < stages; i++) {
            init_barrier(full + i * 8, 2);
            init_barrier(free + i * 8, leaving);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
}

template <int BITS, bool TRANSPOSED, int TOKENS, int SPLIT, int STAGES> struct ManyRows {
    static constexpr int ROW_BYTES = 8 * BITS;   // of 64 weights
    static constexpr int X_BYTES = TOKENS * 128, STAGE = X_BYTES + ROWS * ROW_BYTES;
    static constexpr int SCALE_BYTES = TRANSPOSED ? 128 : 0;
    static constexpr int COUNT = TOKENS / 2 / SPLIT;   // sums of a thread that this block finishes
    // Lanes that say so when a warp has left a stage: of those that read a scale, compute-sanitizer follows the last.
    static constexpr int LEAVING = TRANSPOSED ? 4 : 1;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);   // so that the compiler knows: a warp has one
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    u32 ring;   // stages; then their scales; then what `write` needs

    // The fragments of 32 columns of K: four registers for each 16.
    __device__ __forceinline__ void widen(int stage, int half, u32* a) const {
        const u32 weights = ring + stage * STAGE + X_BYTES;
        u32 out[4];
        if (TRANSPOSED) {   // rows g, g + 8 of the fragment are columns 2g, 2g + 1 of y
            u32 w[4];
            shared_transposed(weights + (half * 32 + lane) * ROWS + (warp ^ lane % 8) * 16, w);
            const u32 scale = ring + STAGES * STAGE + stage * SCALE_BYTES + half * 64 + t * 4;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                widen8(__byte_perm(w[i], 0, 0x3120), out);
                const u32 pair = shared_u32(scale + i * 16);
                a[i * 2] = times(out[0], pair);
                a[i * 2 + 1] = times(out[1], pair);
            }
            return;
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {   // rows g, g + 8
            const u32 row = weights + (warp * 16 + r * 8 + g) * ROW_BYTES;
            if (BITS == 8) {
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const u32 p = row + ((half * 2 + j) ^ (g / 2)) * 16 + t * 2;
                    widen8(shared_u16(p) | shared_u16(p + 8) << 16, out);
                    a[j * 4 + r] = out[0];
                    a[j * 4 + r + 2] = out[1];
                }
            } else {
                const u32 p = row + (half ^ (g / 4)) * 16 + t;
                widen4(shared_u8(p) | shared_u8(p + 4) << 8 | shared_u8(p + 8) << 16 | shared_u8(p + 12) << 24, out);
#pragma unroll
                for (int i = 0; i < 4; i++) a[i / 2 * 4 + r + i % 2 * 2] = out[i];
            }
        }
    }

    // Each block of a cluster finishes its share of the tokens; the others send it their sums. `at`: the ring, which
    // nobody uses any more.
    __device__ __forceinline__ void add_up(const float (&sums)[TOKENS / 2], float (&total)[COUNT], float4* at) const {
        const int part = blockIdx.x % SPLIT;
#pragma unroll
        for (int block = 0; block < SPLIT; block++)
#pragma unroll
            for (int i = 0; i < COUNT; i += 4) {
                const float* v = sums + block * COUNT + i;
                if (block != part) store_to(ring + ((part * COUNT + i) * 64 + threadIdx.x) * 16, block, v);
                else total[i] = v[0], total[i + 1] = v[1], total[i + 2] = v[2], total[i + 3] = v[3];
            }
        cluster_arrive();
        cluster_wait();
        for (int block = 0; block < SPLIT; block++)
            if (block != part)
#pragma unroll
                for (int i = 0; i < COUNT; i += 4) {
                    const float4 v = at[(block * COUNT + i) * 64 + threadIdx.x];
                    total[i] += v.x; total[i + 1] += v.y; total[i + 2] += v.z; total[i + 3] += v.w;
                }
    }

    // y from column first_n and row first_m on. A warp turns its numbers round in shared memory, 16 tokens at a time,
    // to write 16 columns of a row of y; the residual is added there. `staging`: STAGING bytes of the warp's own.
    __device__ __forceinline__ void write(const Epilogue& e, bool wide, float (&total)[COUNT], int first_m, int first_n,
                                          int M, int N, char* staging) const {
        const Epilogue first = {e.scale, e.bias, nullptr, 0, 0, nullptr};
        const int my_n = first_n + warp * 16 + g;
        const Finish ends[2] = {prepare(first, 0, my_n, M, N), prepare(first, 0, my_n + 8, M, N)};
        const u32 mine = address_of(staging) + (lane / 16 * 8 + lane % 8) * PITCH + lane / 8 % 2 * 16;
        const int column = lane % 2 * 8, n = first_n + warp * 16 + column;
#pragma unroll
        for (int i = 0; i < COUNT; i += 8) {
#pragma unroll
            for (int j = i; j < i + 8; j++) {
                total[j] = finished(first, ends[j / 2 % 2], total[j]);
                if (e.gelu) total[j] = gelu(total[j]);
            }
            const int slot = i / 8 % 2 * 16 * PITCH;
            store_transposed(mine + slot, pack(total[i], total[i + 1]), pack(total[i + 2], total[i + 3]),
                             pack(total[i + 4], total[i + 5]), pack(total[i + 6], total[i + 7]));
            __syncwarp();
            const int token = i * 2 + lane / 2, m = first_m + token;
            const char* from = staging + slot + lane / 2 * PITCH;
            uint4 v = *(const uint4*)(from + column * 2);
            if (TRANSPOSED) {   // of 16 columns, the even ones lie before the odd ones
                const uint2 even = *(const uint2*)(from + column), odd = *(const uint2*)(from + column + 16);
                v = make_uint4(__byte_perm(even.x, odd.x, 0x5410), __byte_perm(even.x, odd.x, 0x7632),
                               __byte_perm(even.y, odd.y, 0x5410), __byte_perm(even.y, odd.y, 0x7632));
            }
            if (m >= M || n >= N) continue;
            const size_t place = (size_t)m * N + n;
            if (wide) {
                const float4* r = (const float4*)((const float*)e.residual + place);
                float4* y = (float4*)((float*)e.output + place);
                auto add = [&](u32 a, u32 b, float4 r) {
                    return make_float4(low(a) + e.alpha * r.x, high(a) + e.alpha * r.y, low(b) + e.alpha * r.z,
                                       high(b) + e.alpha * r.w);
                };
                const float4 first = r[0], second = r[1];
                y[0] = add(v.x, v.y, first);
                y[1] = add(v.z, v.w, second);
                continue;
            }
            if (e.residual) {
                const uint4 r = *(const uint4*)(e.residual + place);
                auto add = [&](u32 y, u32 r) { return pack(low(y) + e.alpha * low(r), high(y) + e.alpha * high(r)); };
                v = make_uint4(add(v.x, r.x), add(v.y, r.y), add(v.z, r.z), add(v.w, r.w));
            }
            *(uint4*)((u16*)e.output + place) = v;
        }
        __syncwarp();
    }

    __device__ __forceinline__ void run(const Call& c) {
        extern __shared__ uint4 shared[];
        __shared__ unsigned long long barriers[2 * STAGES];
        const int columns = (c.M + TOKENS - 1) / TOKENS, tiles = (c.N + ROWS - 1) / ROWS * columns;
        const int part = blockIdx.x % SPLIT, first = blockIdx.x / SPLIT, stride = gridDim.x / SPLIT;
        const int steps = (c.K + 63) / 64, begin = steps * part / SPLIT, end = steps * (part + 1) / SPLIT;
        const u32 full = address_of(barriers), free = full + 8 * STAGES;   // of each stage
        ring = (address_of(shared) + 1023) / 1024 * 1024;
        init_ring(full, free, STAGES, WARPS * LEAVING);
        start_next();
        u32 parity = warp >= WARPS;   // those who fill a ring need not wait in its first turn
        int stage = 0;
        auto advance = [&] { if (++stage == STAGES) { stage = 0; parity ^= 1; } };
        if (warp >= WARPS) {
            asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");   // for those who multiply
            const bool weights = warp == WARPS;   // else x and scales, which may have been written just before
            if (!weights) wait();
            for (int tile = first; tile < tiles && warp < WARPS + 2; tile += stride) {
                const int n = tile / columns * ROWS, m = tile % columns * TOKENS;
                for (int step = begin; step < end && lane == 0; step++, advance()) {
                    const u32 barrier = full + stage * 8, to = ring + stage * STAGE;
                    wait_for(free + stage * 8, parity);
                    if (weights) {
                        announce(barrier, STAGE - X_BYTES);
                        copy_box(to + X_BYTES, c.weight, TRANSPOSED ? n : step * ROW_BYTES, TRANSPOSED ? step * 64 : n,
                                 barrier);
                    } else {
                        announce(barrier, X_BYTES + SCALE_BYTES);
                        copy_box(to, c.x, step * 128, m, barrier);
                        if (TRANSPOSED)
                            copy_bytes(ring + STAGES * STAGE + stage * SCALE_BYTES, c.scale + step * 64, SCALE_BYTES,
                                       barrier);
                    }
                }
            }
            return;
        }
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        wait();
        char* at = (char*)shared + (ring - address_of(shared));
        char* staging = at + STAGES * (STAGE + SCALE_BYTES) + warp * STAGING;
        const Epilogue e = {c.scale, c.bias, c.residual, c.alpha, c.gelu, c.y}, bare = {0, 0, 0, 0, 0, c.y};
        auto leave = [&](int s) {
            __syncwarp();   // every lane has read what it needs
            if (lane >= 32 - LEAVING) arrive(free + s * 8);
        };
        u32 a[2][8];
        for (int tile = first; tile < tiles; tile += stride) {
            float sums[TOKENS / 2];
#pragma unroll
            for (int i = 0; i < TOKENS / 2; i++) sums[i] = 0;
            // While the tensor cores have 32 columns of K, the next are widened.
            int before = 0;
            wait_for(full + stage * 8, parity);
            widen(stage, 0, a[0]);
            for (int step = begin;; step++) {
                const unsigned long long b = describe(ring + stage * STAGE);
                begin_products();
                multiply_async(sums, a[0], b);
                multiply_async(sums, a[0] + 4, b + 2);
                commit_products();
                wait_products<1>();
                if (step > begin) leave(before);
                before = stage;
                widen(stage, 1, a[1]);
                begin_products();
                multiply_async(sums, a[1], b + 4);
                multiply_async(sums, a[1] + 4, b + 6);
                commit_products();
                advance();
                if (step + 1 == end) break;
                wait_products<1>();
                wait_for(full + stage * 8, parity);
                widen(stage, 0, a[0]);
            }
            wait_products<0>();
#pragma unroll
            for (int i = 0; i < TOKENS / 2; i++) asm volatile("" : "+f"(sums[i]) :: "memory");   // not used before
            leave(before);
            const int first_n = tile / columns * ROWS, first_m = tile % columns * TOKENS + part * (TOKENS / SPLIT);
            if constexpr (SPLIT == 1) {
                write(TRANSPOSED ? bare : e, c.wide, sums, first_m, first_n, c.M, c.N, staging);
            } else {
                cluster_arrive();   // all warps have left the ring
                cluster_wait();
                float total[COUNT];
                add_up(sums, total, (float4*)at);
                write(TRANSPOSED ? bare : e, c.wide, total, first_m, first_n, c.M, c.N, staging);
                return;   // the ring is gone
            }
        }
    }
};
#define KERNEL(NAME, BITS, TRANSPOSED, TOKENS, SPLIT, STAGES) \
extern "C" __global__ void __cluster_dims__(SPLIT, 1, 1) __launch_bounds__(384, 1) NAME( \
        const __grid_constant__ Call c) { \
    ManyRows<BITS, TRANSPOSED, TOKENS, SPLIT, STAGES>().run(c); \
}
#define MANY_ROWS(BITS, TOKENS, SPLIT, STAGES) KERNEL(many_rows, BITS, false, TOKENS, SPLIT, STAGES)
#define GRADIENT(TOKENS, SPLIT, STAGES) KERNEL(gradient, 8, true, TOKENS, SPLIT, STAGES)
"""
)

# 2 to 32 rows: a block owns 128 columns of y, up to TOKENS rows, and as one of SPLIT blocks of a cluster a part of K.
# One warp has the copy engine bring weights, 128 columns of K a step, another has it bring x; the other eight take 16
# columns of y each. As the order of the columns of K is free in a product, a thread takes 16 columns that lie side by
# side, of the weight and of x. In the end each block of a cluster finishes the columns of y of some of its warps.
#
# Grid: a multiple of SPLIT; block: 320. Tensor maps of bytes: x with boxes of TOKENS rows of 128 bytes, of which a step
# takes two; the weight with 128 rows of 128 bytes (INT4: 64); swizzled.
FEW_ROWS_ON_HOPPER = f"\n#define MOST_STAGES {MOST_STAGES}\n" + (
    r"""template <int BITS, int TOKENS, int SPLIT> struct FewRows {
    static constexpr int STEP = 128, ROW_BYTES = 16 * BITS, BOX = TOKENS * 128;   // bytes of 64 columns of x
    static constexpr int X_BYTES = 2 * BOX, STAGE = X_BYTES + ROWS * ROW_BYTES;
    static constexpr int TILES = TOKENS / 8, OWN = (WARPS + SPLIT - 1) / SPLIT;   // warps that a block finishes
    static constexpr int AHEAD = 4;   // steps before the last one is fetched, the next kernel may start
    static constexpr int BEYOND = 2;   // steps beyond the ring that the L2 cache fetches early
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;

    // What a thread takes of a step is loaded at once, and halves of its columns have sums of their own, if there are
    // registers for that.
    static constexpr bool AT_ONCE = TOKENS <= 16;
    static constexpr int SUMS = AT_ONCE ? 2 : 1;
    // Where its 16 columns of each half are, from the beginning of a stage on: those of row g; of x, in two pieces.
    u32 weight_at[2], x_at[2][2];

    __device__ __forceinline__ FewRows() {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            // Eight threads that read together find theirs in different banks.
            const int sixteen = BITS == 8 ? 2 * t + (half ^ t / 2) : t + (half ? 2 : t / 2 * 4);
            weight_at[half] = X_BYTES + (warp * 16 + g) * ROW_BYTES
                + (BITS == 8 ? (sixteen ^ g) * 16 : (sixteen / 2 ^ g / 2) * 16 + sixteen % 2 * 8);
            for (int i = 0; i < 2; i++)
                x_at[half][i] = sixteen / 4 * BOX + g * 128 + ((sixteen % 4 * 2 + i) ^ g) * 16;
            // Not to be computed again at every step.
            asm volatile("" : "+r"(weight_at[half]), "+r"(x_at[half][0]), "+r"(x_at[half][1]));
        }
    }

    // sums += 128 columns, as of `multiply`.
    __device__ __forceinline__ void multiply_step(u32 stage, float (&sums)[SUMS][TILES][4]) const {
        uint4 w[2][2], x[2][TILES][2];   // of INT4, only half of w
        auto load = [&](int half) {
#pragma unroll
            for (int r = 0; r < 2; r++) {   // rows g, g + 8
                const u32 at = stage + weight_at[half] + r * 8 * ROW_BYTES;
                if (BITS == 8) {
                    w[half][r] = shared_uint4(at);
                } else {
                    const uint2 v = shared_uint2(at);
                    w[half][r].x = v.x; w[half][r].y = v.y;
                }
            }
#pragma unroll
            for (int i = 0; i < TILES; i++)
#pragma unroll
                for (int j = 0; j < 2; j++) x[half][i][j] = shared_uint4(stage + x_at[half][j] + i * 8 * 128);
        };
        auto multiply_half = [&](int half) {
            u32 a[2][8];   // pairs
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const uint4 v = w[half][r];
                if (BITS == 8) {
                    widen8(v.x, a[r]); widen8(v.y, a[r] + 2); widen8(v.z, a[r] + 4); widen8(v.w, a[r] + 6);
                } else {
                    widen4(v.x, a[r]); widen4(v.y, a[r] + 4);
                }
            }
#pragma unroll
            for (int j = 0; j < 8; j += 2)
#pragma unroll
                for (int i = 0; i < TILES; i++) {   // in turn: products that are added to the same sums wait
                    const uint4 v = x[half][i][j / 4];
                    multiply(sums[half % SUMS][i], a[0][j], a[1][j], a[0][j + 1], a[1][j + 1], j % 4 ? v.z : v.x,
                             j % 4 ? v.w : v.y);
                }
        };
        load(0);
        if (AT_ONCE) load(1);
        multiply_half(0);
        if (!AT_ONCE) load(1);
        multiply_half(1);
    }

    __device__ __forceinline__ void run(const Call& c) {
        extern __shared__ uint4 shared[];
        __shared__ unsigned long long barriers[2 * MOST_STAGES];
        const int part = blockIdx.x % SPLIT;
        const int first_n = blockIdx.x / SPLIT * ROWS;
        const int steps = (c.K + STEP - 1) / STEP, begin = steps * part / SPLIT, end = steps * (part + 1) / SPLIT;
        u32 ring = (address_of(shared) + 1023) / 1024 * 1024, full = address_of(barriers);
        asm volatile("" : "+r"(ring), "+r"(full));   // not to be computed again at every step
        const u32 free = full + 8 * MOST_STAGES, received = ring + c.stages * STAGE;
        init_ring(full, free, c.stages);
        if (SPLIT > 1) cluster_arrive();   // this block is there

        float all_sums[SUMS][TILES][4] = {}, (&sums)[TILES][4] = all_sums[0];
        const int owner = warp / OWN, n = first_n + warp * 16 + g, m = t * 2;
        const bool finishes = owner == part && warp < WARPS;
        u32 scale_bias[2], residual[TILES][2];   // two numbers each: of rows g and g + 8; of two tokens
        u32 parity = warp >= WARPS;   // those who fill a ring need not wait in its first turn
        int stage = 0;
        auto advance = [&] { if (++stage == c.stages) { stage = 0; parity ^= 1; } };
        if (warp >= WARPS) {
            const bool weights = warp == WARPS;   // else x, which may have been written just before
            const TensorMap& map = weights ? c.weight : c.x;
            const int bytes = weights ? STAGE - X_BYTES : X_BYTES, step_bytes = weights ? ROW_BYTES : 256;
            asm volatile("prefetch.tensormap [%0];" :: "l"(&map) : "memory");
            if (!weights) wait();
#pragma unroll 1
            for (int step = begin; step < end && lane == 0; step++, advance()) {
                const u32 barrier = full + stage * 8;
                // The ring is full, maybe long before x is there.
                if (weights && step == begin + c.stages)
#pragma unroll 1
                    for (int i = step; i < min(step + BEYOND, end); i++) prefetch_box(map, i * step_bytes, first_n);
                wait_for(free + stage * 8, parity);
                announce(barrier, bytes);
                copy_box(ring + stage * STAGE + weights * X_BYTES, map, step * step_bytes, weights * first_n, barrier);
                if (!weights) copy_box(ring + stage * STAGE + BOX, map, step * step_bytes + 128, 0, barrier);
                // Not before: blocks of the next kernel fetch weights as soon as they are there.
                if (weights && step == max(end - 1 - AHEAD, begin)) start_next();
            }
            __syncwarp();
        } else {
            wait();
            if (finishes)   // what is needed in the end
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const int row = n + r * 8;
                    scale_bias[r] = 0;
                    if (row < c.N) scale_bias[r] = c.scale[row];
                    if (row < c.N && c.bias) scale_bias[r] |= (u32)c.bias[row] << 16;
#pragma unroll
                    for (int i = 0; i < TILES; i++) {
                        const int token = m + i * 8;
                        const u16* from = c.residual + (size_t)token * c.N + row;
                        residual[i][r] = 0;
                        if (c.residual && row < c.N && token < c.M) residual[i][r] = from[0];
                        if (c.residual && row < c.N && token + 1 < c.M) residual[i][r] |= (u32)from[c.N] << 16;
                    }
                }
            for (int step = begin; step < end; step++, advance()) {
                wait_for(full + stage * 8, parity);
                multiply_step(ring + stage * STAGE, all_sums);
                __syncwarp();
                if (lane == 0) arrive(free + stage * 8);
            }
        }

#pragma unroll
        for (int i = 0; i < TILES * 4 && AT_ONCE; i++) sums[i / 4][i % 4] += all_sums[SUMS - 1][i / 4][i % 4];
        if (SPLIT > 1) {
            auto place = [&](int block, int i) {   // of what a block sends to a warp
                return received + (((block * OWN + warp % OWN) * TILES + i) * 32 + lane) * 16;
            };
            cluster_wait();
            if (warp < WARPS && !finishes)
#pragma unroll
                for (int i = 0; i < TILES; i++) store_to(place(part, i), owner, sums[i]);
            cluster_arrive();
            cluster_wait();
#pragma unroll
            for (int block = 0; block < SPLIT; block++)
                if (block != part && finishes)
#pragma unroll
                    for (int i = 0; i < TILES; i++) {
                        const uint4 v = shared_uint4(place(block, i));
                        sums[i][0] += __uint_as_float(v.x); sums[i][1] += __uint_as_float(v.y);
                        sums[i][2] += __uint_as_float(v.z); sums[i][3] += __uint_as_float(v.w);
                    }
        }
        if (!finishes) return;
        const Epilogue e = {c.scale, c.bias, c.residual, c.alpha, c.gelu, c.y};
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int r = j / 2, token = m + i * 8 + j % 2, row = n + r * 8;
                const u32 both = scale_bias[r], pair = residual[i][r];
                const Finish f = {(u16)both, (u16)(both >> 16), (u16)(pair >> j % 2 * 16)};
                if (token < c.M && row < c.N) finish(e, f, sums[i][j], token, row, c.N);
            }
    }
};
#define FEW_ROWS(BITS, TOKENS, SPLIT) \
extern "C" __global__ void __cluster_dims__(SPLIT, 1, 1) __launch_bounds__(320, 2) few_rows( \
        const __grid_constant__ Call c) { \
    FewRows<BITS, TOKENS, SPLIT>().run(c); \
}
"""
)
