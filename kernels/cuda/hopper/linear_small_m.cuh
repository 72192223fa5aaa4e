// 2 to 32 rows: a block owns 128 columns of y, up to TOKENS rows, and as one of SPLIT blocks of a cluster a part of K.
// One warp has the copy engine bring weights, 128 columns of K a step, another has it bring x; the other eight take 16
// columns of y each. As the order of the columns of K is free in a product, a thread takes 16 columns that lie side by
// side, of the weight and of x. In the end each block of a cluster finishes the columns of y of some of its warps.
//
// Grid: a multiple of SPLIT; block: 320. Tensor maps of bytes: x with boxes of TOKENS rows of 128 bytes, of which a
// step takes two; the weight with 128 rows of 128 bytes (INT4: 64); swizzled.
#pragma once

#include "kernels/cuda/dequantize.cuh"
#include "kernels/cuda/hopper/call.cuh"
#include "kernels/cuda/mma.cuh"

#define MOST_STAGES 10

template <int BITS, int TOKENS, int SPLIT>
struct FewRows {
    static constexpr int STEP = 128, ROW_BYTES = 16 * BITS, BOX = TOKENS * 128;  // bytes of 64 columns of x
    static constexpr int X_BYTES = 2 * BOX, STAGE = X_BYTES + ROWS * ROW_BYTES;
    static constexpr int TILES = TOKENS / 8, OWN = (WARPS + SPLIT - 1) / SPLIT;  // warps that a block finishes
    static constexpr int AHEAD = 4;   // steps before the last one is fetched, the next kernel may start
    static constexpr int BEYOND = 2;  // steps beyond the ring that the L2 cache fetches early
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
            weight_at[half] = X_BYTES + (warp * 16 + g) * ROW_BYTES +
                              (BITS == 8 ? (sixteen ^ g) * 16 : (sixteen / 2 ^ g / 2) * 16 + sixteen % 2 * 8);
            for (int i = 0; i < 2; i++) x_at[half][i] = sixteen / 4 * BOX + g * 128 + ((sixteen % 4 * 2 + i) ^ g) * 16;
            // Not to be computed again at every step.
            asm volatile("" : "+r"(weight_at[half]), "+r"(x_at[half][0]), "+r"(x_at[half][1]));
        }
    }

    // sums += 128 columns, as of `multiply`.
    __device__ __forceinline__ void multiply_step(u32 stage, float (&sums)[SUMS][TILES][4]) const {
        uint4 w[2][2], x[2][TILES][2];  // of INT4, only half of w
        auto load = [&](int half) {
#pragma unroll
            for (int r = 0; r < 2; r++) {  // rows g, g + 8
                const u32 at = stage + weight_at[half] + r * 8 * ROW_BYTES;
                if (BITS == 8) {
                    w[half][r] = shared_uint4(at);
                } else {
                    const uint2 v = shared_uint2(at);
                    w[half][r].x = v.x;
                    w[half][r].y = v.y;
                }
            }
#pragma unroll
            for (int i = 0; i < TILES; i++)
#pragma unroll
                for (int j = 0; j < 2; j++) x[half][i][j] = shared_uint4(stage + x_at[half][j] + i * 8 * 128);
        };
        auto multiply_half = [&](int half) {
            u32 a[2][8];  // pairs
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const uint4 v = w[half][r];
                if (BITS == 8) {
                    widen8(v.x, a[r]);
                    widen8(v.y, a[r] + 2);
                    widen8(v.z, a[r] + 4);
                    widen8(v.w, a[r] + 6);
                } else {
                    widen4(v.x, a[r]);
                    widen4(v.y, a[r] + 4);
                }
            }
#pragma unroll
            for (int j = 0; j < 8; j += 2)
#pragma unroll
                for (int i = 0; i < TILES; i++) {  // in turn: products that are added to the same sums wait
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
        asm volatile("" : "+r"(ring), "+r"(full));  // not to be computed again at every step
        const u32 free = full + 8 * MOST_STAGES, received = ring + c.stages * STAGE;
        init_ring(full, free, c.stages);
        if (SPLIT > 1) cluster_arrive();  // this block is there

        float all_sums[SUMS][TILES][4] = {}, (&sums)[TILES][4] = all_sums[0];
        const int owner = warp / OWN, n = first_n + warp * 16 + g, m = t * 2;
        const bool finishes = owner == part && warp < WARPS;
        u32 scale_bias[2], residual[TILES][2];  // two numbers each: of rows g and g + 8; of two tokens
        u32 parity = warp >= WARPS;             // those who fill a ring need not wait in its first turn
        int stage = 0;
        auto advance = [&] {
            if (++stage == c.stages) {
                stage = 0;
                parity ^= 1;
            }
        };
        if (warp >= WARPS) {
            const bool weights = warp == WARPS;  // else x, which may have been written just before
            const TensorMap& map = weights ? c.weight : c.x;
            const int bytes = weights ? STAGE - X_BYTES : X_BYTES, step_bytes = weights ? ROW_BYTES : 256;
            asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
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
            if (finishes)  // what is needed in the end
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
            auto place = [&](int block, int i) {  // of what a block sends to a warp
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
                        sums[i][0] += __uint_as_float(v.x);
                        sums[i][1] += __uint_as_float(v.y);
                        sums[i][2] += __uint_as_float(v.z);
                        sums[i][3] += __uint_as_float(v.w);
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
#define FEW_ROWS(BITS, TOKENS, SPLIT)                                                  \
    extern "C" __global__ void __cluster_dims__(SPLIT, 1, 1) __launch_bounds__(320, 2) \
        few_rows(const __grid_constant__ Call c) {                                     \
        FewRows<BITS, TOKENS, SPLIT>().run(c);                                         \
    }
