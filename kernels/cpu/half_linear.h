/* Linear layers with float16 or bfloat16 weights, for few rows: y [M, N] = x [M, K] · weight [N, K]ᵀ in float32.

   Weights are read once, ROWS rows side by side, for two rows of x at a time. Threads: each has a contiguous range of
   output features. Alignment: none. */
#pragma once

/* sum[i][r] = weight row r · x[i], for `rows` weight rows and `count` rows of x, all K long. */
static inline __attribute__((always_inline)) void half_dots(const uint16_t* w, int dtype, const int rows,
                                                            const float* x, const int count, int64_t K,
                                                            float (*sum)[ROWS]) {
    enum { LINE_HALVES = CACHE_LINE / 2 };
    const int parts = rows == 1 ? 2 : 1; /* two accumulators hide the latency of one row */
    floats s[2][ROWS][2];
    int64_t k = 0;
    for (int i = 0; i < count; i++)
        for (int r = 0; r < rows; r++) s[i][r][0] = s[i][r][1] = zeros();
    for (; k + LINE_HALVES <= K; k += LINE_HALVES) {
        int64_t ahead = k + NEAR / 2 < K ? NEAR / 2 : NEAR / 2 + (rows - 1) * K; /* the next rows' beginnings */
        if (rows == 1)
            __builtin_prefetch(w + k + FAR / 2, 0, 0);
        else
            for (int r = 0; r < rows; r++) __builtin_prefetch(w + r * K + k + ahead);
        for (int at = 0; at < LINE_HALVES; at += FLOATS)
            for (int r = 0; r < rows; r++) {
                const uint16_t* from = w + r * K + k + at;
                floats weight = dtype == HALF ? load_half(from) : load_bfloat(from);
                for (int i = 0; i < count; i++) {
                    floats* to = &s[i][r][at / FLOATS % parts];
                    *to = multiply_add(weight, load(x + i * K + k + at), *to);
                }
            }
    }
    for (int i = 0; i < count; i++)
        for (int r = 0; r < rows; r++) {
            sum[i][r] = reduce_add(parts == 1 ? s[i][r][0] : add(s[i][r][0], s[i][r][1]));
            for (int64_t rest = k; rest < K; rest++) sum[i][r] += element(w + r * K, dtype, rest) * x[i * K + rest];
        }
}

int chatglm_half_linear(const void* x, int x_dtype, const uint16_t* weight, int weight_dtype, void* y, int64_t M,
                        int64_t N, int64_t K, int threads) {
    threads = threads_for(threads, M * N * K);
    float* rows = allocate(M * K * 4);
    if (!rows) return NO_MEMORY;
    read_floats(x, x_dtype, M * K, rows);
#pragma omp parallel num_threads(threads)
    {
        int64_t end = part_end(N);
        for (int64_t n = part_begin(N), height; n < end; n += height) {
            const uint16_t* w = weight + n * K;
            float sum[2][ROWS];
            height = end - n < ROWS || (M == 1 && on_amd()) ? 1 : ROWS;
            for (int64_t m = 0, count; m < M; m += count) {
                const float* row = rows + m * K;
                count = M - m < 2 || height == 1 ? 1 : 2;
                if (height == 1)
                    half_dots(w, weight_dtype, 1, row, 1, K, sum);
                else if (count == 1 && weight_dtype == HALF)
                    half_dots(w, HALF, ROWS, row, 1, K, sum);
                else if (count == 1)
                    half_dots(w, BFLOAT, ROWS, row, 1, K, sum);
                else if (weight_dtype == HALF)
                    half_dots(w, HALF, ROWS, row, 2, K, sum);
                else
                    half_dots(w, BFLOAT, ROWS, row, 2, K, sum);
                for (int64_t i = 0; i < count; i++) write_floats(sum[i], height, x_dtype, y, (m + i) * N + n);
            }
        }
    }
    release(rows);
    return OK;
}
