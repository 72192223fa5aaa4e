// y = epilogue(x * weight^T) of many rows x [M, K] on Hopper; TRANSPOSED: the input gradient y = (x * scale) * weight.
// Modules: linear_large_m_BITS_TILE_M_SPLIT_K, input_gradient_TILE_M_SPLIT_K.
//
// Shapes: quantised weight [N, K], N % 8 == 0; K has a step of 64 for each of SPLIT_K blocks. Tile of y: TILE_M x 128.
// Grid: SPLIT_K == 1: at most a block for each tile, persistent; else SPLIT_K blocks (a cluster) a tile. Block: 384.
// Shared memory: STAGES of x and weights, scales, STAGING for each warp. Aligned to 1024 bytes here.
// Tensor maps: bytes, swizzled. Boxes: x TILE_M rows of 128; weight 128 rows of 64 (INT4: 32), TRANSPOSED 64 of 128.
// Pipeline, as in CUTLASS's warp-specialised GEMM: two producer warps (TMA of weights; of x and scales) run up to
//   STAGES steps ahead, into the next tile, too. Two consumer warpgroups have 64 columns of y each: a thread
//   dequantises fragments from shared to registers while wgmma runs on those before. TRANSPOSED: fragments are columns
//   of the stored weight (ldmatrix.trans of pairs of bytes), times the scale of each row.
#pragma once

#include "kernels/cuda/dequantize.cuh"
#include "kernels/cuda/hopper/pipeline.cuh"
#include "kernels/cuda/hopper/wgmma.cuh"

static_assert((BITS == 8 || (BITS == 4 && !TRANSPOSED)) && TILE_M % 64 == 0 && TILE_M <= 256, "");

struct LinearLargeM {
    TensorMap weight, x;
    Epilogue epilogue;
    int M, N, K;
    int residual_is_float;  // and y. What is added to the residual is rounded before
};

struct LargeM {
    static constexpr int ROW_BYTES = 8 * BITS;  // 64 weights
    static constexpr int X_BYTES = TILE_M * 128, STAGE = X_BYTES + TILE_N * ROW_BYTES;
    static constexpr int SCALE_BYTES = TRANSPOSED ? 128 : 0;
    static constexpr int COUNT = TILE_M / 2 / SPLIT_K;  // outputs of a thread
    // Arrivals a warp makes on the empty barrier: of the readers of a scale, compute-sanitizer tracks the last.
    static constexpr int ARRIVALS = TRANSPOSED ? 4 : 1;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // uniform in a warp, for the compiler
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    u32 ring;  // STAGES; then their scales; then STAGING

    // Fragments of 32 columns of K, four registers for each 16.
    __device__ __forceinline__ void load_fragments(int stage, int half, u32* fragments) const {
        const u32 weights = ring + stage * STAGE + X_BYTES;
        u32 out[4];
        if (TRANSPOSED) {  // rows g, g + 8 of the fragment are columns 2g, 2g + 1 of y
            u32 w[4];
            ldmatrix_x4_trans(weights + (half * 32 + lane) * TILE_N + (warp ^ lane % 8) * 16, w);
            const u32 scale = ring + STAGES * STAGE + stage * SCALE_BYTES + half * 64 + t * 4;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                dequantize_int8(__byte_perm(w[i], 0, 0x3120), out);
                const u32 pair = ld_shared_u32(scale + i * 16);
                fragments[i * 2] = mul2(out[0], pair);
                fragments[i * 2 + 1] = mul2(out[1], pair);
            }
        } else {
#pragma unroll
            for (int r = 0; r < 2; r++) {  // rows g, g + 8
                const u32 row = weights + (warp * 16 + r * 8 + g) * ROW_BYTES;
                if (BITS == 8) {
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const u32 p = row + ((half * 2 + j) ^ (g / 2)) * 16 + t * 2;
                        dequantize_int8(ld_shared_u16(p) | ld_shared_u16(p + 8) << 16, out);
                        fragments[j * 4 + r] = out[0];
                        fragments[j * 4 + r + 2] = out[1];
                    }
                } else {
                    const u32 p = row + (half ^ (g / 4)) * 16 + t;
                    dequantize_int4(ld_shared_u8(p) | ld_shared_u8(p + 4) << 8 | ld_shared_u8(p + 8) << 16 |
                                        ld_shared_u8(p + 12) << 24,
                                    out);
#pragma unroll
                    for (int i = 0; i < 4; i++) fragments[i / 2 * 4 + r + i % 2 * 2] = out[i];
                }
            }
        }
    }

    // Split-K: each block of a cluster reduces its share of the rows. The others send it their sums, to the ring
    // (`at`), which is idle now.
    __device__ __forceinline__ void reduce_cluster(const float (&sums)[TILE_M / 2], float (&total)[COUNT],
                                                   float4* at) const {
        const int part = blockIdx.x % SPLIT_K;
#pragma unroll
        for (int block = 0; block < SPLIT_K; block++)
#pragma unroll
            for (int i = 0; i < COUNT; i += 4) {
                const float* v = sums + block * COUNT + i;
                if (block != part)
                    st_cluster_v4(ring + ((part * COUNT + i) * 64 + threadIdx.x) * 16, block, v);
                else
                    total[i] = v[0], total[i + 1] = v[1], total[i + 2] = v[2], total[i + 3] = v[3];
            }
        cluster_arrive();
        cluster_wait();
        for (int block = 0; block < SPLIT_K; block++)
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

    // Epilogue of y[first_m:, first_n:]. A warp transposes 16 rows at a time in shared memory (staging: STAGING bytes
    // of the warp), adds the residual and stores 16 columns of each row.
    __device__ __forceinline__ void write(const Epilogue& e, bool residual_is_float, float* total, int first_m,
                                          int first_n, int M, int N, char* staging) const {
        const Epilogue first = {e.scale, e.bias, nullptr, nullptr, 0, 0};
        const int my_n = first_n + warp * 16 + g;
        const EpilogueOperands ends[2] = {load_operands(first, 0, my_n, M, N), load_operands(first, 0, my_n + 8, M, N)};
        const u32 mine = smem_address(staging) + (lane / 16 * 8 + lane % 8) * PITCH + lane / 8 % 2 * 16;
        const int column = lane % 2 * 8, n = first_n + warp * 16 + column;
#pragma unroll
        for (int i = 0; i < COUNT; i += 8) {
#pragma unroll
            for (int j = i; j < i + 8; j++) {
                total[j] = apply_epilogue(first, ends[j / 2 % 2], total[j]);
                if (e.gelu) total[j] = gelu(total[j]);
            }
            const int slot = i / 8 % 2 * 16 * PITCH;
            stmatrix_x4_trans(mine + slot, pack(total[i], total[i + 1]), pack(total[i + 2], total[i + 3]),
                              pack(total[i + 4], total[i + 5]), pack(total[i + 6], total[i + 7]));
            __syncwarp();
            const int token = i * 2 + lane / 2, m = first_m + token;
            const char* from = staging + slot + lane / 2 * PITCH;
            uint4 v = *(const uint4*)(from + column * 2);
            if (TRANSPOSED) {  // of 16 columns, the even ones precede the odd ones
                const uint2 even = *(const uint2*)(from + column), odd = *(const uint2*)(from + column + 16);
                v = make_uint4(__byte_perm(even.x, odd.x, 0x5410), __byte_perm(even.x, odd.x, 0x7632),
                               __byte_perm(even.y, odd.y, 0x5410), __byte_perm(even.y, odd.y, 0x7632));
            }
            if (m >= M || n >= N) continue;
            const size_t place = (size_t)m * N + n;
            if (residual_is_float) {
                const float4* r = (const float4*)((const float*)e.residual + place);
                float4* y = (float4*)((float*)e.y + place);
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
            *(uint4*)((u16*)e.y + place) = v;
        }
        __syncwarp();
    }

    __device__ __forceinline__ void run(const LinearLargeM& a) {
        extern __shared__ uint4 shared[];
        __shared__ unsigned long long barriers[2 * STAGES];
        const int columns = (a.M + TILE_M - 1) / TILE_M, tiles = (a.N + TILE_N - 1) / TILE_N * columns;
        const int part = blockIdx.x % SPLIT_K, first = blockIdx.x / SPLIT_K, stride = gridDim.x / SPLIT_K;
        const int steps = (a.K + 63) / 64, begin = steps * part / SPLIT_K, end = steps * (part + 1) / SPLIT_K;
        const u32 full = smem_address(barriers), empty = full + 8 * STAGES;  // barriers of each stage
        ring = (smem_address(shared) + 1023) / 1024 * 1024;
        init_barriers(full, empty, STAGES, CONSUMERS * ARRIVALS);
        pdl_launch_dependents();
        u32 parity = warp >= CONSUMERS;  // producers find the first STAGES empty
        int stage = 0;
        auto advance = [&] {
            if (++stage == STAGES) {
                stage = 0;
                parity ^= 1;
            }
        };
        if (warp >= CONSUMERS) {
            asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");  // registers go to the consumers
            const bool weights = warp == CONSUMERS;               // else x and scales, results of kernels before
            if (!weights) pdl_wait();
            for (int tile = first; tile < tiles && warp < CONSUMERS + 2; tile += stride) {
                const int n = tile / columns * TILE_N, m = tile % columns * TILE_M;
                for (int step = begin; step < end && lane == 0; step++, advance()) {
                    const u32 barrier = full + stage * 8, to = ring + stage * STAGE;
                    mbarrier_wait(empty + stage * 8, parity);
                    if (weights) {
                        mbarrier_arrive_expect_tx(barrier, STAGE - X_BYTES);
                        tma_load(to + X_BYTES, a.weight, TRANSPOSED ? n : step * ROW_BYTES, TRANSPOSED ? step * 64 : n,
                                 barrier);
                    } else {
                        mbarrier_arrive_expect_tx(barrier, X_BYTES + SCALE_BYTES);
                        tma_load(to, a.x, step * 128, m, barrier);
                        if (TRANSPOSED)
                            bulk_load(ring + STAGES * STAGE + stage * SCALE_BYTES, a.epilogue.scale + step * 64,
                                      SCALE_BYTES, barrier);
                    }
                }
            }
            return;
        }
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        pdl_wait();
        char* at = (char*)shared + (ring - smem_address(shared));
        char* staging = at + STAGES * (STAGE + SCALE_BYTES) + warp * STAGING;
        const Epilogue e = a.epilogue, bare = {0, 0, 0, e.y, 0, 0};
        auto release = [&](int s) {
            __syncwarp();  // all lanes have read
            if (lane >= 32 - ARRIVALS) mbarrier_arrive(empty + s * 8);
        };
        u32 fragments[2][8];
        for (int tile = first; tile < tiles; tile += stride) {
            float sums[TILE_M / 2];
#pragma unroll
            for (int i = 0; i < TILE_M / 2; i++) sums[i] = 0;
            // While wgmma runs on 32 columns of K, the next are dequantised.
            int before = 0;
            mbarrier_wait(full + stage * 8, parity);
            load_fragments(stage, 0, fragments[0]);
            for (int step = begin;; step++) {
                const unsigned long long b = smem_descriptor(ring + stage * STAGE);
                wgmma_fence();
                wgmma(sums, fragments[0], b);
                wgmma(sums, fragments[0] + 4, b + 2);
                wgmma_commit();
                wgmma_wait<1>();
                if (step > begin) release(before);
                before = stage;
                load_fragments(stage, 1, fragments[1]);
                wgmma_fence();
                wgmma(sums, fragments[1], b + 4);
                wgmma(sums, fragments[1] + 4, b + 6);
                wgmma_commit();
                advance();
                if (step + 1 == end) break;
                wgmma_wait<1>();
                mbarrier_wait(full + stage * 8, parity);
                load_fragments(stage, 0, fragments[0]);
            }
            wgmma_wait<0>();
#pragma unroll
            for (int i = 0; i < TILE_M / 2; i++) asm volatile("" : "+f"(sums[i])::"memory");  // no use before the wait
            release(before);
            const int first_n = tile / columns * TILE_N, first_m = tile % columns * TILE_M + part * (TILE_M / SPLIT_K);
            float reduced[COUNT], *total = sums;
            if (SPLIT_K > 1) {
                cluster_arrive();  // all warps have left the ring
                cluster_wait();
                reduce_cluster(sums, reduced, (float4*)at);
                total = reduced;
            }
            write(TRANSPOSED ? bare : e, a.residual_is_float, total, first_m, first_n, a.M, a.N, staging);
            if (SPLIT_K > 1) return;  // the ring is overwritten
        }
    }
};

extern "C" __global__ void __cluster_dims__(SPLIT_K, 1, 1) __launch_bounds__(384, 1)
    linear_large_m(const __grid_constant__ LinearLargeM a) {
    LargeM().run(a);
}
