/* Attention: context [B, S, H, D] = softmax(scaling · q · kᵀ + mask) · v, in float32.

   One query: keys and values are read where they lie. Several: the keys of a head are transposed to
   [T / KEYS][D][KEYS], and tiles of QUERIES queries by KEYS keys stay in registers.
   Threads: each has a contiguous range of the B · H heads, with scores and transposed keys of its own, aligned to 64
   bytes. D is a multiple of 16, MAX_HEAD at most. */
#pragma once

/* exp(x): 2^(x / ln 2) from its integer part and a polynomial, within 2 units in the last place. Below -87.3 that of
   -87.3, above 88.7 infinity, NaN of NaN. Written for a compiler to vectorise. */
static inline float fast_exp(float x) {
    float bounded = x > 88.7f ? 88.7f : x > -87.3f ? x : -87.3f;
    float whole = (bounded * 1.44269504f + 0x1.8p23f) - 0x1.8p23f;
    float part = (bounded - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float power = 1.9875691500e-4f;
    power = power * part + 1.3981999507e-3f;
    power = power * part + 8.3334519073e-3f;
    power = power * part + 4.1665795894e-2f;
    power = power * part + 1.6666665459e-1f;
    power = power * part + 5.0000001201e-1f;
    power = power * part * part + part + 1;
    power *= float_of_bits((uint32_t)((int32_t)whole + 127) << 23);
    return x > 88.7f ? INFINITY : x != x ? x : power;
}

enum {
    QUERIES = FLOATS == 16 ? 8 : 4, /* queries of a tile of scores: as many as registers hold */

    KEYS = 2 * FLOATS,
};

/* weight [T] = exp(weight · scaling + mask - the largest of these); returns their sum. There is room for a multiple of
   KEYS weights. */
static float softmax_row(float* weight, int64_t T, float scaling, const char* mask, int dtype) {
    float most[KEYS], sum[KEYS] = {0};
    int64_t t = 0;
    for (; t + FLOATS <= T; t += FLOATS)
        store(weight + t,
              multiply_add(load(weight + t), broadcast(scaling), mask ? load_any(mask, dtype, t) : zeros()));
    for (; t < T; t++) weight[t] = weight[t] * scaling + (mask ? element(mask, dtype, t) : 0);
    for (; t % KEYS; t++) weight[t] = -INFINITY;
    for (int i = 0; i < KEYS; i++) most[i] = weight[i];
    for (t = KEYS; t < T; t += KEYS)
        for (int i = 0; i < KEYS; i++) most[i] = weight[t + i] > most[i] ? weight[t + i] : most[i];
    for (int i = 1; i < KEYS; i++) most[0] = most[i] > most[0] ? most[i] : most[0];
    for (t = 0; t < T; t += KEYS)
        for (int i = 0; i < KEYS; i++) sum[i] += weight[t + i] = fast_exp(weight[t + i] - most[0]);
    for (int i = 1; i < KEYS; i++) sum[0] += sum[i];
    return sum[0];
}

/* sum [D] = softmax(shrunk · query · keysᵀ + mask) · values for a query [D] and T keys and values that lie k_t and v_t
   numbers apart; weight [T] is working memory. Callers pass dtype as a constant, so that each gets code of its own. */
static inline __attribute__((always_inline)) void attend_head(const float* query, const char* keys, int64_t k_t,
                                                              const char* values, int64_t v_t, const char* mask,
                                                              const int dtype, float scaling, int64_t T, int64_t D,
                                                              float* weight, float* sum) {
    enum { WIDTH = 4 }; /* vectors of the context that are summed at a time */
    int64_t size = size_of(dtype);
    for (int64_t t = 0; t < T; t++) {
        const char* key = keys + t * k_t * size;
        floats score[2] = {zeros(), zeros()};
        for (int64_t d = 0; d < D; d += 2 * FLOATS) {
            score[0] = multiply_add(load_any(key, dtype, d), load(query + d), score[0]);
            if (d + FLOATS < D)
                score[1] = multiply_add(load_any(key, dtype, d + FLOATS), load(query + d + FLOATS), score[1]);
        }
        weight[t] = reduce_add(add(score[0], score[1]));
    }
    float whole = softmax_row(weight, T, scaling, mask, dtype);
    for (int64_t d = 0; d < D; d += WIDTH * FLOATS) {
        floats part[WIDTH] = {zeros(), zeros(), zeros(), zeros()};
        int64_t vectors = min_i64(WIDTH, (D - d) / FLOATS);
        for (int64_t t = 0; t < T; t++) {
            floats p = broadcast(weight[t]);
            const char* value = values + t * v_t * size;
            if (vectors == WIDTH)
                for (int j = 0; j < WIDTH; j++)
                    part[j] = multiply_add(load_any(value, dtype, d + j * FLOATS), p, part[j]);
            else
                for (int64_t j = 0; j < vectors; j++)
                    part[j] = multiply_add(load_any(value, dtype, d + j * FLOATS), p, part[j]);
        }
        for (int64_t j = 0; j < vectors; j++) store(sum + d + j * FLOATS, part[j]);
    }
    for (int64_t d = 0; d < D; d++) sum[d] /= whole;
}

/* Keys [T, D] that lie k_t numbers apart as floats [T / KEYS][D][KEYS], zeros where there are none. */
static void transpose_keys(const char* keys, int64_t k_t, int dtype, int64_t T, int64_t D, float* to) {
    float key[MAX_HEAD];
    memset(to + T / KEYS * KEYS * D, 0, (size_t)(T % KEYS ? KEYS * D : 0) * sizeof *to);
    for (int64_t t = 0; t < T; t++) {
        read_floats(keys + t * k_t * size_of(dtype), dtype, D, key);
        for (int64_t d = 0; d < D; d++) to[(t / KEYS * D + d) * KEYS + t % KEYS] = key[d];
    }
}

/* score[i, t] = query i · key t: query [QUERIES, D], score [QUERIES, stride]. */
static void score_queries(const float* query, const float* keys, int64_t T, int64_t D, float* score, int64_t stride) {
    for (int64_t t = 0; t < T; t += KEYS) {
        floats s[QUERIES][2];
        for (int i = 0; i < QUERIES; i++) s[i][0] = s[i][1] = zeros();
        for (int64_t d = 0; d < D; d++, keys += KEYS) {
            floats first = load(keys), second = load(keys + FLOATS);
            for (int i = 0; i < QUERIES; i++) {
                floats q = broadcast(query[i * D + d]);
                s[i][0] = multiply_add(first, q, s[i][0]);
                s[i][1] = multiply_add(second, q, s[i][1]);
            }
        }
        for (int i = 0; i < QUERIES; i++) {
            store(score + i * stride + t, s[i][0]);
            store(score + i * stride + t + FLOATS, s[i][1]);
        }
    }
}

/* sum[i, d] = Σ weight[i, t] · value[t, d], for `vectors` vectors from d on: 1 or 2. */
static inline __attribute__((always_inline)) void sum_values(const float* weight, int64_t stride, const char* values,
                                                             int64_t v_t, const int dtype, int64_t T, int64_t D,
                                                             int64_t d, const int vectors, float* sum) {
    floats s[QUERIES][2];
    for (int i = 0; i < QUERIES; i++) s[i][0] = s[i][1] = zeros();
    for (int64_t t = 0; t < T; t++, values += v_t * size_of(dtype)) {
        floats first = load_any(values, dtype, d), second = vectors == 2 ? load_any(values, dtype, d + FLOATS) : first;
        for (int i = 0; i < QUERIES; i++) {
            floats w = broadcast(weight[i * stride + t]);
            s[i][0] = multiply_add(first, w, s[i][0]);
            if (vectors == 2) s[i][1] = multiply_add(second, w, s[i][1]);
        }
    }
    for (int i = 0; i < QUERIES; i++)
        for (int j = 0; j < vectors; j++) store(sum + i * D + d + j * FLOATS, s[i][j]);
}

static void sum_all_values(const float* weight, int64_t stride, const char* values, int64_t v_t, int dtype, int64_t T,
                           int64_t D, float* sum) {
    for (int64_t d = 0; d < D; d += 2 * FLOATS) {
        int two = D - d > FLOATS;
        if (two && dtype == HALF)
            sum_values(weight, stride, values, v_t, HALF, T, D, d, 2, sum);
        else if (two && dtype == FLOAT)
            sum_values(weight, stride, values, v_t, FLOAT, T, D, d, 2, sum);
        else if (two)
            sum_values(weight, stride, values, v_t, BFLOAT, T, D, d, 2, sum);
        else
            sum_values(weight, stride, values, v_t, dtype, T, D, d, 1, sum);
    }
}

int chatglm_attention(const void* q, int64_t q_b, int64_t q_h, int64_t q_s, const void* k, int64_t k_b, int64_t k_h,
                      int64_t k_t, const void* v, int64_t v_b, int64_t v_h, int64_t v_t, const void* mask,
                      int64_t mask_b, int64_t mask_s, void* context, int dtype, float scaling, int64_t B, int64_t H,
                      int64_t S, int64_t T, int64_t D, int threads) {
    int64_t size = size_of(dtype), padded_T = round_up(T, KEYS), rows = S == 1 ? 1 : QUERIES;
    threads = threads_for(threads, 2 * B * H * S * T * D);
    /* For each thread: scores; for several queries, transposed keys. */
    int64_t own_size = rows * padded_T + (S == 1 ? 0 : padded_T * D);
    float* memory = allocate(threads * own_size * 4);
    if (!memory) return NO_MEMORY;
#pragma omp parallel num_threads(threads)
    {
        float *weight = memory + thread_number() * own_size, *transposed = weight + rows * padded_T;
        float query[QUERIES * MAX_HEAD], sum[QUERIES * MAX_HEAD];
        for (int64_t i = part_begin(B * H); i < part_end(B * H); i++) {
            int64_t b = i / H, h = i % H;
            const char* queries = (const char*)q + (b * q_b + h * q_h) * size;
            const char* keys = (const char*)k + (b * k_b + h * k_h) * size;
            const char* values = (const char*)v + (b * v_b + h * v_h) * size;
            const char* masks = mask ? (const char*)mask + b * mask_b * size : NULL;
            if (S == 1) {
                read_floats(queries, dtype, D, query);
                if (dtype == HALF)
                    attend_head(query, keys, k_t, values, v_t, masks, HALF, scaling, T, D, weight, sum);
                else if (dtype == FLOAT)
                    attend_head(query, keys, k_t, values, v_t, masks, FLOAT, scaling, T, D, weight, sum);
                else
                    attend_head(query, keys, k_t, values, v_t, masks, BFLOAT, scaling, T, D, weight, sum);
                write_floats(sum, D, dtype, context, i * D);
                continue;
            }
            transpose_keys(keys, k_t, dtype, T, D, transposed);
            for (int64_t s = 0; s < S; s += QUERIES) {
                int64_t count = min_i64(QUERIES, S - s);
                float whole[QUERIES];
                memset(query, 0, sizeof query);
                for (int64_t r = 0; r < count; r++)
                    read_floats(queries + (s + r) * q_s * size, dtype, D, query + r * D);
                score_queries(query, transposed, T, D, weight, padded_T);
                for (int64_t r = 0; r < count; r++)
                    whole[r] = softmax_row(weight + r * padded_T, T, scaling,
                                           masks ? masks + (s + r) * mask_s * size : NULL, dtype);
                sum_all_values(weight, padded_T, values, v_t, dtype, T, D, sum);
                for (int64_t r = 0; r < count; r++) {
                    for (int64_t d = 0; d < D; d++) sum[r * D + d] /= whole[r];
                    write_floats(sum + r * D, D, dtype, context, ((b * S + s + r) * H + h) * D);
                }
            }
        }
    }
    release(memory);
    return OK;
}
