// A block has tiles of 128 columns of y and TOKENS rows, one after the other and, as one of SPLIT blocks of a cluster,
// a part of K. Two warps have the copy engine bring 64 columns of the weight and of x at a time, up to STAGES steps
// ahead and for the block's next tile, too. Of the two warpgroups beside theirs each takes 64 columns of y: a thread
// reads the weights of its fragments from shared memory and widens them in registers, while the tensor cores multiply
// those before by x, which they read from shared memory.
//
// `many_rows` reads weights 2 bytes (INT4: 1) at a time, as its fragments have them. `gradient` multiplies by the
// weight itself: its fragments are columns of what is stored, of which pairs of bytes come transposed, and each number
// is multiplied by the scale of its row.
//
// Grid: as many blocks as tiles, or less; SPLIT times as many as tiles, if K is cut. Block: 384. Tensor maps of bytes:
// x with boxes of TOKENS rows of 128 bytes; the weight with 128 rows of 64 bytes (INT4: 32), or for `gradient` 64 rows
// of 128; all swizzled. N is a multiple of 8, and there is a step for each of SPLIT blocks.
#pragma once

#include "kernels/cuda/dequantize.cuh"
#include "kernels/cuda/hopper/call.cuh"
#include "kernels/cuda/hopper/wgmma.cuh"

template <int BITS, bool TRANSPOSED, int TOKENS, int SPLIT, int STAGES>
struct ManyRows {
    static constexpr int ROW_BYTES = 8 * BITS;  // of 64 weights
    static constexpr int X_BYTES = TOKENS * 128, STAGE = X_BYTES + ROWS * ROW_BYTES;
    static constexpr int SCALE_BYTES = TRANSPOSED ? 128 : 0;
    static constexpr int COUNT = TOKENS / 2 / SPLIT;  // sums of a thread that this block finishes
    // Lanes that say so when a warp has left a stage: of those that read a scale, compute-sanitizer follows the last.
    static constexpr int LEAVING = TRANSPOSED ? 4 : 1;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // so that the compiler knows: a warp has one
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    u32 ring;  // stages; then their scales; then what `write` needs

    // The fragments of 32 columns of K: four registers for each 16.
    __device__ __forceinline__ void widen(int stage, int half, u32* a) const {
        const u32 weights = ring + stage * STAGE + X_BYTES;
        u32 out[4];
        if (TRANSPOSED) {  // rows g, g + 8 of the fragment are columns 2g, 2g + 1 of y
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
        for (int r = 0; r < 2; r++) {  // rows g, g + 8
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
                if (block != part)
                    store_to(ring + ((part * COUNT + i) * 64 + threadIdx.x) * 16, block, v);
                else
                    total[i] = v[0], total[i + 1] = v[1], total[i + 2] = v[2], total[i + 3] = v[3];
            }
        cluster_arrive();
        cluster_wait();
        for (int block = 0; block < SPLIT; block++)
            if (block != part)
#pragma unroll
                for (int i = 0; i < COUNT; i += 4) {
                    const float4 v = at[(block * COUNT + i) * 64 + threadIdx.x];
                    total[i] += v.x;
                    total[i + 1] += v.y;
                    total[i + 2] += v.z;
                    total[i + 3] += v.w;
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
            if (TRANSPOSED) {  // of 16 columns, the even ones lie before the odd ones
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
        const u32 full = address_of(barriers), free = full + 8 * STAGES;  // of each stage
        ring = (address_of(shared) + 1023) / 1024 * 1024;
        init_ring(full, free, STAGES, WARPS * LEAVING);
        start_next();
        u32 parity = warp >= WARPS;  // those who fill a ring need not wait in its first turn
        int stage = 0;
        auto advance = [&] {
            if (++stage == STAGES) {
                stage = 0;
                parity ^= 1;
            }
        };
        if (warp >= WARPS) {
            asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");  // for those who multiply
            const bool weights = warp == WARPS;  // else x and scales, which may have been written just before
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
            __syncwarp();  // every lane has read what it needs
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
            for (int i = 0; i < TOKENS / 2; i++) asm volatile("" : "+f"(sums[i])::"memory");  // not used before
            leave(before);
            const int first_n = tile / columns * ROWS, first_m = tile % columns * TOKENS + part * (TOKENS / SPLIT);
            if constexpr (SPLIT == 1) {
                write(TRANSPOSED ? bare : e, c.wide, sums, first_m, first_n, c.M, c.N, staging);
            } else {
                cluster_arrive();  // all warps have left the ring
                cluster_wait();
                float total[COUNT];
                add_up(sums, total, (float4*)at);
                write(TRANSPOSED ? bare : e, c.wide, total, first_m, first_n, c.M, c.N, staging);
                return;  // the ring is gone
            }
        }
    }
};
#define KERNEL(NAME, BITS, TRANSPOSED, TOKENS, SPLIT, STAGES)                          \
    extern "C" __global__ void __cluster_dims__(SPLIT, 1, 1) __launch_bounds__(384, 1) \
        NAME(const __grid_constant__ Call c) {                                         \
        ManyRows<BITS, TRANSPOSED, TOKENS, SPLIT, STAGES>().run(c);                    \
    }
#define MANY_ROWS(BITS, TOKENS, SPLIT, STAGES) KERNEL(many_rows, BITS, false, TOKENS, SPLIT, STAGES)
#define GRADIENT(TOKENS, SPLIT, STAGES) KERNEL(gradient, 8, true, TOKENS, SPLIT, STAGES)
