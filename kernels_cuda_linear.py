"""CUDA C++ of the products with quantised weights, a part of `kernels_cuda_source`.

Letters as in `kernels_cuda`.
"""

# One row of x: a block of 8 warps, two to a multiprocessor, owns 16 weight rows at a time, each warp every eighth 64
# bytes of them. RING copies of 16 bytes to shared memory are under way for each thread and row at any time, from before
# the kernel's turn (weights depend on nothing) to its end, over the boundaries of tiles. A thread reads what it has
# copied itself. x is in shared memory, too; the sums of the 16 rows come from the tensor cores, whose 8 columns are all
# alike then. More copies under way would delay what the blocks tell each other from kernel to kernel.
# Grid: any; block: 256; weight, its rows and x aligned to 16 bytes.
ONE_ROW = r"""
// An operation on one token. `kernels_cuda.Operation` is the same struct.
struct Operation {
    const void* input;          // x [K]; qkv [B, H * 3 * D]; ids [B]
    void* output;               // y [N]; [B, H * D]; hidden [B, N]
    const unsigned char* weight;
    const u16* scale;
    const u16* bias;
    const u16* residual;
    const u16* norm_weight;     // [K] or null: x is normalised first,
    const u16* norm_bias;
    u16* normed;                // [K], and stored here
    float* cosines;             // [B, D]
    float* sines;
    const float* frequencies;   // [D / 2R]
    long long* positions;       // [B, R]
    const long long* advance;
    u16* keys;                  // [B, H, T, D]
    u16* values;
    int* slots;                 // [B]
    const int* padding;         // [B]
    float* parts;
    u32* tickets;
    int bits, N, K, gelu, H, T, R, prefix, most;
    float alpha, epsilon;
};

#define WARPS 8
#if __CUDA_ARCH__ >= 800
#define RING 4
#else
#define RING 2
#endif
#define TURN (RING * WARPS * 64)   // bytes of a row that a block has under way

struct Ring {
    uint4* place;             // this thread's, in shared memory; every 256th is its own
    const unsigned char* p;   // where this thread's bytes of a turn begin, in row g
    size_t stride;            // from there to row g + 8
    int left, rows_left;      // bytes of the row, and rows, from there on
    __device__ __forceinline__ void point_at(const Operation& op, int tile, int turn) {
        const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
        const int row_bytes = op.K * op.bits / 8, byte = turn * TURN + warp * 64 + t * 16, n = tile * 16 + g;
        p = op.weight + (size_t)n * row_bytes + byte;
        stride = 8 * (size_t)row_bytes;
        left = row_bytes - byte;
        rows_left = op.N - n;
    }
    __device__ __forceinline__ void fetch(int r) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const bool inside = r * WARPS * 64 < left && h * 8 < rows_left;
            copy_async(place + (r * 2 + h) * 256, inside ? p + h * stride + r * WARPS * 64 : p, inside);
        }
        commit();
    }
};

// The sum of every thread's v, of a block of at most 16 warps; `shared` was not read since the last barrier.
__device__ __forceinline__ float block_sum(float v, float* shared) {
#pragma unroll
    for (int i = 16; i; i /= 2) v += __shfl_xor_sync(~0u, v, i);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
    __syncthreads();
    v = 0;
    for (int i = 0; i < blockDim.x / 32; i++) v += shared[i];
    return v;
}
// LayerNorm of x [K] in shared memory, of which each thread has every blockDim'th 16 bytes; the variance is taken
// around the mean. Block 0 stores the result in `normed`, too.
__device__ __forceinline__ void normalise(uint4* x, const uint4* weight, const uint4* bias, const Operation& op,
                                          float* shared) {
    float sum = 0;
    for (int i = threadIdx.x; i < op.K / 8; i += blockDim.x) {
        const uint4 v = x[i];
        sum += low(v.x) + high(v.x) + low(v.y) + high(v.y) + low(v.z) + high(v.z) + low(v.w) + high(v.w);
    }
    const float mean = block_sum(sum, shared) / op.K;
    sum = 0;
    for (int i = threadIdx.x; i < op.K / 8; i += blockDim.x) {
        const uint4 v = x[i];
        const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float a = low(words[j]) - mean, b = high(words[j]) - mean;
            sum += a * a + b * b;
        }
    }
    const float scale = rsqrtf(block_sum(sum, shared + 16) / op.K + op.epsilon);
    for (int i = threadIdx.x; i < op.K / 8; i += blockDim.x) {
        x[i] = normalised(x[i], mean, scale, weight[i], bias[i]);
        if (op.normed && blockIdx.x == 0) ((uint4*)op.normed)[i] = x[i];
    }
}

// y = LayerNorm(x) . weight, with what follows a product.
template <int BITS> __device__ __forceinline__ void linear(const Operation& op) {
    constexpr int CHUNK = 128 / BITS;   // weights in 16 bytes
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int turns = (op.K * BITS / 8 + TURN - 1) / TURN, tiles = (op.N + 15) / 16;
    extern __shared__ uint4 ring_and_x[];
    __shared__ float part[2][WARPS][16], sums[32];
    uint4* x = ring_and_x + RING * 512;
    uint4* norm = x + turns * (TURN / BITS);   // its weights; x is padded
    Ring ring;
    ring.place = ring_and_x + threadIdx.x;
    start_next();
    ring.point_at(op, blockIdx.x, 0);
#pragma unroll
    for (int r = 0; r < RING; r++) ring.fetch(r);
    for (int i = threadIdx.x; i < op.K / 8 && op.norm_weight; i += WARPS * 32) {
        norm[i] = ((const uint4*)op.norm_weight)[i];
        norm[op.K / 8 + i] = ((const uint4*)op.norm_bias)[i];
    }
    wait();
    for (int i = threadIdx.x; i < turns * (TURN / BITS); i += WARPS * 32)
        x[i] = i * 8 < op.K ? __ldcg((const uint4*)op.input + i) : make_uint4(0, 0, 0, 0);
    // Each thread needs nothing but what it has stored itself.
    if (op.norm_weight) normalise(x, norm, norm + op.K / 8, op, sums);
    __syncthreads();
    const uint4* my_x = x + (warp * 4 + t) * CHUNK / 8;
    int buffer = 0;   // sums of every second tile have another
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, buffer ^= 1) {
        float even[4] = {0, 0, 0, 0}, odd[4] = {0, 0, 0, 0};
        // One thread finishes one sum; what it needs for that is loaded early.
        const int n = tile * 16 + threadIdx.x;
        const Finish end = prepare(op, threadIdx.x / 16, n, 1, op.N);
        for (int turn = 0; turn < turns; turn++) {
            if (turn + 1 < turns) ring.point_at(op, tile, turn + 1);
            else ring.point_at(op, tile + gridDim.x, 0);
            const uint4* turn_x = my_x + turn * (TURN / BITS);
#pragma unroll
            for (int r = 0; r < RING; r++) {
                const uint4* xs = turn_x + r * WARPS * 4 * CHUNK / 8;
                wait_copies<RING - 1>();
                const uint4 first = ring.place[r * 512], second = ring.place[r * 512 + 256];
                const u32 w[4] = {first.x, first.y, first.z, first.w}, v[4] = {second.x, second.y, second.z, second.w};
#pragma unroll
                for (int j = 0; j < CHUNK / 8; j++) {   // 8 weights of either row
                    const uint4 b = xs[j];
                    u32 c[4], d[4];
                    if (BITS == 8) {
                        widen8(w[2 * j], c); widen8(w[2 * j + 1], c + 2);
                        widen8(v[2 * j], d); widen8(v[2 * j + 1], d + 2);
                    } else if (BITS == 4) {
                        widen4(w[j], c); widen4(v[j], d);
                    } else {
#pragma unroll
                        for (int i = 0; i < 4; i++) { c[i] = w[i]; d[i] = v[i]; }
                    }
                    multiply(even, c[0], d[0], c[1], d[1], b.x, b.y);
                    multiply(odd, c[2], d[2], c[3], d[3], b.z, b.w);
                }
                ring.fetch(r);
            }
        }
        if (t == 0) {
            part[buffer][warp][g] = even[0] + odd[0];
            part[buffer][warp][g + 8] = even[2] + odd[2];
        }
        __syncthreads();
        if (threadIdx.x < 16 && n < op.N) {
            float sum = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += part[buffer][w][threadIdx.x];
            finish(op, end, sum, 0, n, op.N);
        }
    }
}
"""
ROW_KERNEL = r"""
#define ROW(BITS) \
extern "C" __global__ void __launch_bounds__(256, 2) row_##BITS(const __grid_constant__ Operation op) { \
    linear<BITS>(op); \
}
"""

# 2 to 8 rows: likewise, with 16 · HEIGHT weight rows to a block.
ROWS = r"""
template <int BITS, int HEIGHT>
__device__ __forceinline__ void rows(const unsigned char* __restrict__ weight, const u16* x,
                                     const Epilogue& e, int M, int N, int K) {
    constexpr int COLUMNS = 8, DEPTH = RING / HEIGHT;
    constexpr int CHUNK = 128 / BITS;                  // weights in 16 bytes
    constexpr int STEP = 4 * CHUNK;                    // weights in 64 bytes
    constexpr int SPAN = DEPTH * WARPS * 64;            // bytes of a row that are under way
    constexpr int TILE = 16 * HEIGHT;
    extern __shared__ uint4 shared_x[];
    __shared__ float part[2][WARPS][TILE * COLUMNS];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const size_t row_bytes = (size_t)K * BITS / 8;
    const int turns = (row_bytes + SPAN - 1) / SPAN;   // of a tile
    const int tiles = (N + TILE - 1) / TILE;
    const int stride = turns * (SPAN * 8 / BITS) + 8;

    uint4 ring[DEPTH][2 * HEIGHT];
    // Where this thread's bytes of a turn begin, in row g, and how many weights there are from there on.
    const unsigned char* p;
    int left, rows_left;
    auto point_at = [&](int tile, int turn) {
        const int k = (turn * DEPTH * WARPS + warp) * STEP + t * CHUNK, n = tile * TILE + g;
        p = weight + n * row_bytes + (size_t)k * BITS / 8;
        left = K - k;
        rows_left = N - n;
    };
    auto fetch = [&](int r) {
#pragma unroll
        for (int h = 0; h < 2 * HEIGHT; h++)
            ring[r][h] = load_stream(p + h * 8 * row_bytes + r * WARPS * 64,
                                     r * WARPS * STEP < left && h * 8 < rows_left);
    };

    start_next();
    point_at(blockIdx.x, 0);
#pragma unroll
    for (int r = 0; r < DEPTH; r++) fetch(r);
    wait();
    for (int i = threadIdx.x; i < M * (stride / 8); i += WARPS * 32) {
        const int m = i / (stride / 8), k = (i % (stride / 8)) * 8;
        copy_async(&shared_x[i], k < K ? x + (size_t)m * K + k : x, k < K);
    }
    commit();
    wait_copies<0>();
    __syncthreads();
    const u16* my_x = (u16*)shared_x + min(g, M - 1) * stride + warp * STEP + t * CHUNK;

    int buffer = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, buffer ^= 1) {
        float even[HEIGHT][4], odd[HEIGHT][4];
#pragma unroll
        for (int h = 0; h < HEIGHT; h++)
#pragma unroll
            for (int i = 0; i < 4; i++) even[h][i] = odd[h][i] = 0;
        // One thread finishes one sum; what it needs for that is loaded early.
        const int m = threadIdx.x / TILE, n = tile * TILE + threadIdx.x % TILE;
        const Finish end = prepare(e, m, n, M, N);
        for (int turn = 0; turn < turns; turn++) {
            const bool last = turn + 1 == turns;
            point_at(last ? tile + gridDim.x : tile, last ? 0 : turn + 1);
            const uint4* turn_x = (const uint4*)(my_x + turn * (SPAN * 8 / BITS));
#pragma unroll
            for (int r = 0; r < DEPTH; r++) {
                const uint4* xs = turn_x + r * WARPS * STEP / 8;
                u32 w[2 * HEIGHT][4];
#pragma unroll
                for (int h = 0; h < 2 * HEIGHT; h++) {
                    w[h][0] = ring[r][h].x; w[h][1] = ring[r][h].y; w[h][2] = ring[r][h].z; w[h][3] = ring[r][h].w;
                }
#pragma unroll
                for (int j = 0; j < CHUNK / 8; j++) {   // 8 weights of every row
                    const uint4 b = xs[j];
#pragma unroll
                    for (int h = 0; h < HEIGHT; h++) {
                        u32 c[4], d[4];
                        if (BITS == 8) {
                            widen8(w[2 * h][2 * j], c); widen8(w[2 * h][2 * j + 1], c + 2);
                            widen8(w[2 * h + 1][2 * j], d); widen8(w[2 * h + 1][2 * j + 1], d + 2);
                        } else {
                            widen4(w[2 * h][j], c); widen4(w[2 * h + 1][j], d);
                        }
                        multiply(even[h], c[0], d[0], c[1], d[1], b.x, b.y);
                        multiply(odd[h], c[2], d[2], c[3], d[3], b.z, b.w);
                    }
                }
                fetch(r);
            }
        }
        float* mine = part[buffer][warp];
#pragma unroll
        for (int h = 0; h < HEIGHT; h++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                mine[(2 * t + i % 2) * TILE + h * 16 + i / 2 * 8 + g] = even[h][i] + odd[h][i];
        __syncthreads();
        if (m < M && n < N) {
            float sum = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += part[buffer][w][threadIdx.x];
            finish(e, end, sum, m, n, N);
        }
    }
}
#define ROWS(NAME, BITS, HEIGHT) \
extern "C" __global__ void __launch_bounds__(256, 2) NAME(const unsigned char* weight, const u16* x, \
        const u16* scale, const u16* bias, const u16* residual, float alpha, int use_gelu, u16* y, \
        int M, int N, int K) { \
    const Epilogue e = {scale, bias, residual, alpha, use_gelu, y}; \
    rows<BITS, HEIGHT>(weight, x, e, M, N, K); \
}
"""

# Many rows: a block owns 64 · HEIGHT weight rows (blockIdx.x), MT rows of x (blockIdx.z), and a part of K (blockIdx.y).
# Weights and x come through shared memory, STAGES - 1 steps ahead; each thread widens the weights that it copied
# itself, once for all MT rows. With several parts of K, the block that comes last adds them up, in their order.
# Block: 128; alignment as above.
TILES = r"""
template <int BITS, int MT, int HEIGHT, int STAGES>
__device__ __forceinline__ void tiles(const unsigned char* __restrict__ weight, const u16* x,
                                      const Epilogue& e, float* parts, u32* tickets, int M, int N, int K) {
    constexpr int CHUNK = 128 / BITS, HALF = 4 * CHUNK, STEP = 2 * HALF, NT = MT / 8, STRIDE = (STEP + 8) / 8;
    constexpr int THREADS = 128, WEIGHTS = 4 * HEIGHT * THREADS, STAGE = WEIGHTS + MT * STRIDE;   // in 16 bytes
    extern __shared__ uint4 shared[];
    __shared__ bool is_last;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const size_t row_bytes = (size_t)K * BITS / 8;
    const int row = (blockIdx.x * 4 + warp) * 16 * HEIGHT + g, column = blockIdx.z * MT;
    const int all_steps = (K + STEP - 1) / STEP, per_part = (all_steps + gridDim.y - 1) / gridDim.y;
    const int begin = blockIdx.y * per_part, end = min(begin + per_part, all_steps);

    // A step is 128 bytes of each row, in two halves; the thread has 16 bytes of each, in 2 · HEIGHT rows.
    const unsigned char* my_weight = weight + row * row_bytes + t * 16;
    auto copy_weights = [&](int step, int slot) {
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int h = 0; h < 2 * HEIGHT; h++) {
                const int k = step * STEP + i * HALF + t * CHUNK;
                const bool inside = step < end && k < K && row + h * 8 < N;
                copy_async(&shared[slot * STAGE + (i * 2 * HEIGHT + h) * THREADS + threadIdx.x],
                           inside ? my_weight + h * 8 * row_bytes + step * 128 + i * 64 : weight, inside);
            }
    };
    auto copy_x = [&](int step, int slot) {
#pragma unroll
        for (int i = threadIdx.x; i < MT * STEP / 8; i += THREADS) {
            const int m = i / (STEP / 8), c = i % (STEP / 8), k = step * STEP + c * 8;
            const bool inside = step < end && column + m < M && k < K;
            copy_async(&shared[slot * STAGE + WEIGHTS + m * STRIDE + c],
                       inside ? x + (size_t)(column + m) * K + k : x, inside);
        }
        commit();
    };

    start_next();
    for (int s = 0; s < STAGES - 1; s++) copy_weights(begin + s, s);
    wait();
    for (int s = 0; s < STAGES - 1; s++) copy_x(begin + s, s);   // the first group has all the weights, too

    float sums[HEIGHT][NT][4];
#pragma unroll
    for (int h = 0; h < HEIGHT; h++)
#pragma unroll
        for (int c = 0; c < NT; c++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[h][c][i] = 0;

    int slot = 0;
    for (int step = begin; step < end; step++) {
        wait_copies<STAGES - 2>();
        __syncthreads();
        const int free = slot == 0 ? STAGES - 1 : slot - 1;
        copy_weights(step + STAGES - 1, free);
        copy_x(step + STAGES - 1, free);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint4* here = shared + slot * STAGE + half * 2 * HEIGHT * THREADS;
            const uint4* xs = shared + slot * STAGE + WEIGHTS + g * STRIDE + (half * HALF + t * CHUNK) / 8;
            u32 words[2 * HEIGHT][4];
#pragma unroll
            for (int h = 0; h < 2 * HEIGHT; h++) {
                const uint4 w = here[h * THREADS + threadIdx.x];
                words[h][0] = w.x; words[h][1] = w.y; words[h][2] = w.z; words[h][3] = w.w;
            }
#pragma unroll
            for (int j = 0; j < CHUNK / 8; j++) {   // 8 weights of every row
                u32 a[2 * HEIGHT][4];
#pragma unroll
                for (int h = 0; h < 2 * HEIGHT; h++) {
                    if (BITS == 8) { widen8(words[h][2 * j], a[h]); widen8(words[h][2 * j + 1], a[h] + 2); }
                    else widen4(words[h][j], a[h]);
                }
#pragma unroll
                for (int c = 0; c < NT; c++) {
                    const uint4 b = xs[c * 8 * STRIDE + j];
#pragma unroll
                    for (int h = 0; h < HEIGHT; h++) {
                        u32 (&p)[4] = a[2 * h], (&q)[4] = a[2 * h + 1];
                        multiply(sums[h][c], p[0], q[0], p[1], q[1], b.x, b.y);
                        multiply(sums[h][c], p[2], q[2], p[3], q[3], b.z, b.w);
                    }
                }
            }
        }
        slot = slot == STAGES - 1 ? 0 : slot + 1;
    }

    // The sums leave the registers, for memory if other parts are to be added, and are finished by a loop.
    constexpr int COUNT = HEIGHT * NT * 4;
    const size_t tile = (size_t)blockIdx.z * gridDim.x + blockIdx.x;
    wait_copies<0>();
    __syncthreads();
    float* kept = (gridDim.y > 1 ? parts + tile * gridDim.y * COUNT * THREADS : (float*)shared) + threadIdx.x;
#pragma unroll
    for (int h = 0; h < HEIGHT; h++)
#pragma unroll
        for (int c = 0; c < NT; c++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                kept[((size_t)blockIdx.y * COUNT + (h * NT + c) * 4 + i) * THREADS] = sums[h][c][i];
    if (gridDim.y > 1) {
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            is_last = atomicAdd(&tickets[tile], 1) == gridDim.y - 1;
            if (is_last) tickets[tile] = 0;   // for the next launch
        }
        __syncthreads();
        if (!is_last) return;
        __threadfence();
    }
    const int count = gridDim.y;
#pragma unroll 1
    for (int c = 0; c < NT; c++) {
        float total[HEIGHT][4];
        Finish ends[HEIGHT][4];
#pragma unroll
        for (int h = 0; h < HEIGHT; h++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                total[h][i] = 0;
                ends[h][i] = prepare(e, column + c * 8 + 2 * t + i % 2, row + h * 16 + i / 2 * 8, M, N);
            }
        const float* from = kept + c * 4 * THREADS;
#pragma unroll 4
        for (int part = 0; part < count; part++, from += COUNT * THREADS)
#pragma unroll
            for (int h = 0; h < HEIGHT; h++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float* at = from + (h * NT * 4 + i) * THREADS;
                    total[h][i] += count > 1 ? __ldcg(at) : *at;
                }
#pragma unroll
        for (int h = 0; h < HEIGHT; h++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int n = row + h * 16 + i / 2 * 8, m = column + c * 8 + 2 * t + i % 2;
                if (n < N && m < M) finish(e, ends[h][i], total[h][i], m, n, N);
            }
    }
}
#define TILES(NAME, BITS, MT, HEIGHT, STAGES, BLOCKS) \
extern "C" __global__ void __launch_bounds__(128, BLOCKS) NAME(const unsigned char* weight, const u16* x, \
        const u16* scale, const u16* bias, const u16* residual, float alpha, int use_gelu, u16* y, \
        float* parts, u32* tickets, int M, int N, int K) { \
    const Epilogue e = {scale, bias, residual, alpha, use_gelu, y}; \
    tiles<BITS, MT, HEIGHT, STAGES>(weight, x, e, parts, tickets, M, N, K); \
}
"""

# 2 to 16 rows of up to 4096 columns: a block of 16 warps owns 16 weight rows at a time, each warp 1/16 of the columns,
# for which it has all of x in registers. Up to 64 KB of weights are on the way to shared memory at any time; as each
# thread reads what it has copied itself, warps meet but once a tile, to add up their sums.
# Grid: any; block: 512; alignment as above.
FEW_ROWS = r"""
struct Norm {
    const u16* weight;   // [K] or null: x is normalised first,
    const u16* bias;
    u16* normed;         // [M, K], and stored here
    float epsilon;
};

template <int BITS, int MT>
__device__ __forceinline__ void few_rows(const unsigned char* __restrict__ weight, const u16* x, const Norm& norm,
                                         const Epilogue& e, int M, int N, int K) {
    constexpr int CHUNK = 128 / BITS, NT = MT / 8, WARPS = 16, THREADS = 512;
    constexpr int SLOTS = 4096 * BITS / 8 / WARPS / 64;   // 64 bytes of a row, for each warp
    constexpr int DEPTH = 4 / SLOTS;   // tiles under way
    constexpr int HEIGHT = 16, PITCH = HEIGHT + 4;
    extern __shared__ uint4 shared[];
    float* const all_parts = (float*)(shared + 4 * 2 * THREADS);   // [2][WARPS][MT * PITCH]
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int tiles = (N + HEIGHT - 1) / HEIGHT;
    const int row_bytes = K * BITS / 8, my_byte = warp * 64 + t * 16;
    uint4* ring = shared + threadIdx.x;         // this thread's bytes; every 512th is its own

    auto fetch = [&](int tile, int slot, int depth) {
        const int byte = my_byte + slot * WARPS * 64, n = tile * HEIGHT + g;
        const unsigned char* from = weight + (size_t)n * row_bytes + byte;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const bool inside = byte < row_bytes && n + h * 8 < N;
            copy_async(ring + ((depth * SLOTS + slot) * 2 + h) * THREADS,
                       inside ? from + h * 8 * (size_t)row_bytes : weight, inside);
        }
        commit();
    };
    start_next();
#pragma unroll
    for (int d = 0; d < DEPTH; d++)
#pragma unroll
        for (int r = 0; r < SLOTS; r++) fetch(blockIdx.x + d * gridDim.x, r, d);
    wait();
    uint4 my_x[SLOTS][NT][CHUNK / 8];
#pragma unroll
    for (int r = 0; r < SLOTS; r++)
#pragma unroll
        for (int c = 0; c < NT; c++)
#pragma unroll
            for (int j = 0; j < CHUNK / 8; j++) {
                const int m = c * 8 + g, k = (my_byte + r * WARPS * 64) * 8 / BITS + j * 8;
                my_x[r][c][j] = m < M && k < K ? __ldcg((const uint4*)(x + (size_t)m * K + k)) : make_uint4(0, 0, 0, 0);
            }

    if (norm.weight) {   // as `normalise` does it
        float mean[NT], scale[NT];
#pragma unroll
        for (int c = 0; c < NT; c++) mean[c] = 0;
        // Sums of every row of x: of its numbers, then of the squares of their distances from the mean.
        auto sum_rows = [&](float* parts, float (&totals)[NT], bool squares) {
#pragma unroll
            for (int c = 0; c < NT; c++) {
                float sum = 0;
#pragma unroll
                for (int r = 0; r < SLOTS; r++) {
#pragma unroll
                    for (int j = 0; j < CHUNK / 8; j++) {
                        const uint4 v = my_x[r][c][j];
                        const u32 words[4] = {v.x, v.y, v.z, v.w};
                        const bool inside = (my_byte + r * WARPS * 64) * 8 / BITS + j * 8 < K;
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            const float p = low(words[i]) - mean[c], q = high(words[i]) - mean[c];
                            if (inside) sum += squares ? p * p + q * q : p + q;
                        }
                    }
                }
                sum += __shfl_xor_sync(~0u, sum, 1);
                sum += __shfl_xor_sync(~0u, sum, 2);
                if (t == 0) parts[warp * MT + c * 8 + g] = sum;
            }
            __syncthreads();
#pragma unroll
            for (int c = 0; c < NT; c++) {
                float total = 0;
#pragma unroll
                for (int w = 0; w < WARPS; w++) total += parts[w * MT + c * 8 + g];
                totals[c] = total / K;
            }
        };
        float* const parts = all_parts + WARPS * MT * PITCH;   // the first tile has the other buffer
        sum_rows(parts, mean, false);
        sum_rows(parts + WARPS * MT, scale, true);
#pragma unroll
        for (int c = 0; c < NT; c++) scale[c] = rsqrtf(scale[c] + norm.epsilon);
#pragma unroll
        for (int r = 0; r < SLOTS; r++) {
#pragma unroll
            for (int j = 0; j < CHUNK / 8; j++) {
                const int k = (my_byte + r * WARPS * 64) * 8 / BITS + j * 8;
                if (k >= K) continue;
                const uint4 w = *(const uint4*)(norm.weight + k), b = *(const uint4*)(norm.bias + k);
#pragma unroll
                for (int c = 0; c < NT; c++) {
                    my_x[r][c][j] = normalised(my_x[r][c][j], mean[c], scale[c], w, b);
                    const int m = c * 8 + g;
                    if (blockIdx.x == 0 && m < M) *(uint4*)(norm.normed + (size_t)m * K + k) = my_x[r][c][j];
                }
            }
        }
    }

    int buffer = 0, depth = 0;
    const int m = threadIdx.x / HEIGHT, i = threadIdx.x % HEIGHT;   // a thread finishes row i of a tile for row m of x
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, buffer ^= 1) {
        float sums[NT][4];
#pragma unroll
        for (int c = 0; c < NT; c++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[c][i] = 0;
        const int n = tile * HEIGHT + i;
        const Finish end = prepare(e, m, n, M, N);
#pragma unroll
        for (int r = 0; r < SLOTS; r++) {
            wait_copies<DEPTH * SLOTS - 1>();
            const uint4* here = ring + (depth * SLOTS + r) * 2 * THREADS;
            const uint4 upper = here[0], lower = here[THREADS];
            const u32 w[4] = {upper.x, upper.y, upper.z, upper.w}, v[4] = {lower.x, lower.y, lower.z, lower.w};
#pragma unroll
            for (int j = 0; j < CHUNK / 8; j++) {   // 8 weights of either row
                u32 p[4], q[4];
                if (BITS == 8) {
                    widen8(w[2 * j], p); widen8(w[2 * j + 1], p + 2);
                    widen8(v[2 * j], q); widen8(v[2 * j + 1], q + 2);
                } else {
                    widen4(w[j], p); widen4(v[j], q);
                }
#pragma unroll
                for (int c = 0; c < NT; c++) {
                    const uint4 b = my_x[r][c][j];
                    multiply(sums[c], p[0], q[0], p[1], q[1], b.x, b.y);
                    multiply(sums[c], p[2], q[2], p[3], q[3], b.z, b.w);
                }
            }
            fetch(tile + DEPTH * gridDim.x, r, depth);
        }
        if (DEPTH > 1) depth = depth == DEPTH - 1 ? 0 : depth + 1;
        float* parts = all_parts + buffer * WARPS * MT * PITCH;
#pragma unroll
        for (int c = 0; c < NT; c++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                parts[(warp * MT + c * 8 + 2 * t + i % 2) * PITCH + i / 2 * 8 + g] = sums[c][i];
        __syncthreads();
        if (m < M && n < N) {
            float sum = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += parts[(w * MT + m) * PITCH + i];
            finish(e, end, sum, m, n, N);
        }
    }
    wait_copies<0>();
}
#define FEW_ROWS(BITS, MT) \
extern "C" __global__ void __launch_bounds__(512, 1) few_rows(const unsigned char* weight, const u16* x, \
        const u16* scale, const u16* bias, const u16* residual, float alpha, int use_gelu, u16* y, \
        const u16* norm_weight, const u16* norm_bias, u16* normed, float epsilon, int M, int N, int K) { \
    const Epilogue e = {scale, bias, residual, alpha, use_gelu, y}; \
    const Norm norm = {norm_weight, norm_bias, normed, epsilon}; \
    few_rows<BITS, MT>(weight, x, norm, e, M, N, K); \
}
"""

# What remains of a product when the weight is expanded for cuBLAS.
EXPAND = r"""
// The float weight q · scale [N, K]: a thread widens 8 weights of 4 rows; grid.x over the row, grid.y over rows.
template <int BITS>
__device__ __forceinline__ void expand(const unsigned char* __restrict__ weight, const u16* __restrict__ scale,
                                       u16* __restrict__ out, int N, int K) {
    const int k = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    const size_t row_bytes = (size_t)K * BITS / 8;
    if (k >= K) return;
    if (K % 8 == 0) {
        for (int first = blockIdx.y * 4; first < N; first += gridDim.y * 4) {
            uint2 v[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const unsigned char* p = weight + (first + i) * row_bytes + k * BITS / 8;
                v[i] = make_uint2(0, 0);
                if (first + i < N) {
                    if (BITS == 8) v[i] = *(const uint2*)p;
                    else v[i].x = *(const u32*)p;
                }
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (first + i >= N) break;
                const float s = to_float(scale[first + i]);
                u32 w[4];
                if (BITS == 8) { widen8(v[i].x, w); widen8(v[i].y, w + 2); }
                else widen4(v[i].x, w);
                *(uint4*)(out + (size_t)(first + i) * K + k) =
                    make_uint4(pack(low(w[0]) * s, high(w[0]) * s), pack(low(w[1]) * s, high(w[1]) * s),
                               pack(low(w[2]) * s, high(w[2]) * s), pack(low(w[3]) * s, high(w[3]) * s));
            }
        }
    } else {
        for (int n = blockIdx.y; n < N; n += gridDim.y)
            for (int i = k; i < min(k + 8, K); i++) {
                const unsigned char* p = weight + n * row_bytes;
                int v;
                if (BITS == 8) v = (signed char)p[i];
                else v = (i & 1) ? (int)((u32)p[i / 2] << 28) >> 28 : (int)((u32)p[i / 2] << 24) >> 28;
                out[(size_t)n * K + i] = to_u16(v * to_float(scale[n]));
            }
    }
}
extern "C" __global__ void expand_8(const unsigned char* weight, const u16* scale, u16* out, int N, int K) {
    expand<8>(weight, scale, out, N, K);
}
extern "C" __global__ void expand_4(const unsigned char* weight, const u16* scale, u16* out, int N, int K) {
    expand<4>(weight, scale, out, N, K);
}
"""

# Of the kernels tiles_BITS_MT: (HEIGHT, STAGES, blocks that a multiprocessor holds at once).
TILE_SHAPES = {
    (8, 8): (1, 4, 4),
    (8, 16): (2, 3, 3),
    (8, 32): (2, 4, 2),
    (8, 64): (2, 3, 2),
    (4, 8): (1, 4, 4),
    (4, 16): (1, 3, 4),
    (4, 32): (2, 2, 3),
    (4, 64): (2, 2, 2),
}
# Of the modules few_BITS_MT: MT.
FEW_WIDTHS = (8, 16)
