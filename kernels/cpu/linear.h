#pragma once

/* ---- Linear layers with int8 or int4 weights: x [M, K], weight [N, K], y [M, N] ----

   Products are integers: each row of x, in blocks of columns, is written as a sum of `digits`,
   x = scale[0]·digit[0] + scale[1]·digit[1] + …, each a small integer with a scale a fraction of the one before, so
   that products with weights and their sums are exact. There are as many digits as leave about as little as rounding
   to half (half activations) or to float (float activations) would.

   One row: weights are streamed from memory once. Several rows: a panel of weight rows meets all rows of x, in tiles
   of sums,
     - of a matrix unit, whose digits are int8;
     - of bytes, where instructions multiply unsigned weights by signed bytes, two of which make a digit of 16 bits;
     - of pairs, with half as many products, where that is faster;
     - else of 16-bit numbers, or of int8 with NEON's dot product.
*/

/* ---- Activations become digits ---- */

#ifdef EMULATE_AMX /* for tests on machines without a matrix unit: the intrinsics, of tiles of 16 rows of 64 bytes */
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
static _Thread_local int32_t tile_memory[8][16][16];
static void _tile_zero(int t) { memset(tile_memory[t], 0, sizeof tile_memory[t]); }
static void _tile_loadd(int t, const void* from, int64_t stride) {
    for (int row = 0; row < 16; row++) memcpy(tile_memory[t][row], (const char*)from + row * stride, 64);
}
static void _tile_stored(int t, void* to, int64_t stride) {
    for (int row = 0; row < 16; row++) memcpy((char*)to + row * stride, tile_memory[t][row], 64);
}
static void _tile_dpbssd(int sum, int a, int b) {
    const int8_t *rows = (const int8_t*)tile_memory[a], *columns = (const int8_t*)tile_memory[b];
    for (int n = 0; n < 16; n++)
        for (int m = 0; m < 16; m++)
            for (int k = 0; k < 64; k++)
                tile_memory[sum][n][m] += rows[n * 64 + k] * columns[k / 4 * 64 + m * 4 + k % 4];
}
static void _tile_loadconfig(const void* config) { (void)config; }
static void _tile_release(void) {}
#endif

enum {
    PADDED_M = 16, /* rows of sums are padded to a multiple of this */
    DIGIT_MAX = sizeof(digit_t) == 1 ? 127 : 32767,
    CHUNK = sizeof(panel_t) == 1 ? 256 : 128, /* output features that a thread takes at once, at most */
    FEW_CHUNK = 16,                           /* the same of few rows: as many as make a vector of results */
#ifdef BYTE_TILES
    JOINED = 1,  /* whether two bytes make a digit */
    GROUP = 256, /* rows whose digits of a block stay in the cache beside weights */
#else
    JOINED = 0,
    GROUP = sizeof(panel_t) == 1 ? 512 : 64,
#endif
    STORED_M = JOINED ? 16 : 32, /* rows, at most, that meet weights where they are stored: too few for a panel */
    M_AT_ONCE = 512,             /* rows of x that are held as digits */
    /* Of tiles of bytes and of pairs, whose sums of a block are exact in 32 bits: */
    TILE_BLOCK = 512,       /* columns of a block */
    TILE_DIGIT_MAX = 32639, /* a weight more is 32767 at most; times 128, summed over a block, it is below 2^31 */
    PAIR_CHUNK = 256,       /* CHUNK for pairs */
};

struct job {
    const void *x, *scale, *bias;
    const int8_t* weight;
    void* y;
    int x_dtype, scale_dtype, bias_dtype, bits;
    int planes;                 /* digits that a number has */
    int width;                  /* rows of x in a tile of PADDED_M sums: that, or half as many, each in two places */
    int pairs;                  /* whether products are taken in pairs: see add_pairs */
    int64_t tile_n;             /* weight rows of a tile */
    int64_t M, N, K, block;     /* block: columns of a block, BLOCK at most */
    int64_t padded_M, padded_K; /* padded_M: sums that a weight row has */
    digit_t* row_digits;        /* of one row: [plane][padded_K] */
    panel_t* digits;            /* of several: [plane][padded_M][padded_K], or as tile_of or pairs_of says */
    float* digit_scale;         /* [blocks][planes][padded_M] */
    int32_t* start;             /* what sums start with, if not 0: of bytes [blocks][byte_tiles][padded_M], of pairs
                                   [blocks][planes][padded_M], of one row [parts][halves][planes][FLOATS] */
};

/* Columns of a block, with those that pad K. */
static inline int64_t block_columns(const struct job* j, int64_t block) {
    return least(j->block, j->padded_K - block * j->block);
}

/* Digits of one number: those of int16 hold 15 bits, those of int8 about 7.5. */
static int digits_of(int x_dtype, size_t digit_size) { return (digit_size == 1 ? 2 : 1) + (x_dtype == FLOAT); }

#if defined(AMX) || defined(BYTE_TILES)
#define TILES
#ifdef AMX
/* Places from one digit of a row of x to its next. Fewer rows than a tile has leave no gap: two digits of 8 rows are
   one tile. */
static inline int next_digit(const struct job* j) { return (int)least(j->M, TILE_M); }
static inline int byte_tiles(const struct job* j) { return (j->planes * next_digit(j) + TILE_M - 1) / TILE_M; }
#else
static inline int byte_tiles(const struct job* j) { return j->planes + JOINED; }
#endif

/* Bytes of digits in the order that tiles are multiplied in, where a sum takes four at a time:
   [block][m / 16][k / 64][tile][k / 4 % 16][place][k % 4], and of 8 rows [block][k / 64][tile][k / 8 % 8][m][k % 8].
   Of a matrix unit, tiles have 16 places each, and digit i of row m is in place i · next_digit + m % 16 of all of them.
   Else the place is m % 16, and the tiles are the two bytes of the first digit, and the second digit. */
static inline panel_t* tile_of(const struct job* j, int64_t m, int64_t block) {
    int64_t columns = block_columns(j, block);
    return j->digits + (block * j->block * j->padded_M + m / 16 * 16 * columns) * byte_tiles(j);
}
#endif

#ifdef BYTE_TILES
/* total[n, i] += weights · digits for BYTE_N weight rows and PADDED_M sums, each of which takes `deep` columns at a
   time. Digits of 16 bits are two bytes, 256 · high + low. Weight rows lie `stride` bytes apart, and their parts of 64
   columns `step` bytes. `stored`: as stored, so not unsigned yet, while others are fetched from `ahead` on. `bytes`:
   byte_tiles. */
static inline __attribute__((always_inline)) void add_bytes(const struct job* j, const int8_t* weights, int64_t stride,
                                                            int64_t step, const int stored, int64_t block, int64_t m,
                                                            const int8_t* ahead, const int bytes, const int deep,
                                                            float (*total)[PADDED_M]) {
    const int64_t size = 64 * (64 / deep); /* of a plane's 64 columns */
    const int64_t P = j->padded_M;
    for (int i = 0; i < PADDED_M; i += FLOATS) {
        const int8_t *x = tile_of(j, m, block) + 4 * i, *w = weights;
        const int32_t* start = j->start + block * bytes * P + m + i;
        const sums a = load_sums(start), b = load_sums(start + P), c = load_sums(start + (bytes - 1) * P);
        /* An array would stay in memory, with gcc 12. */
#define START(n) sums a##n = a, b##n = b, c##n = c;
        FOR_BYTE_N(START)
        for (int64_t k = block_columns(j, block); k > 0; k -= 64, w += step, x += bytes * size) {
            for (int part = 0; part < 64; part += deep) {
                if (stored && i == 0 && part % (64 / BYTE_N) == 0) { /* not all at once: the rest would wait */
                    __builtin_prefetch(w + part / (64 / BYTE_N) * stride + NEAR / 4);
                    __builtin_prefetch(ahead, 0, 2);
                    ahead += LINE;
                }
                const int8_t *from = w + part, *digit = x + 64 / deep * part;
                const digits x_a = load_digits(digit), x_b = load_digits(digit + size);
                const digits x_c = load_digits(digit + (bytes - 1) * size);
#define ADD(n)                                                                             \
    {                                                                                      \
        digits of_w = deep == 4 ? repeat4(from + n * stride) : repeat8(from + n * stride); \
        if (stored) of_w = flip_signs(of_w);                                               \
        a##n = add_products(a##n, of_w, x_a);                                              \
        b##n = add_products(b##n, of_w, x_b);                                              \
        if (bytes == 3) c##n = add_products(c##n, of_w, x_c);                              \
    }
                FOR_BYTE_N(ADD)
            }
        }
        const float* scales = j->digit_scale + block * (bytes - 1) * P + m + i;
        const floats scale = load(scales), last_scale = load(scales + (bytes - 2) * P);
#define WHOLE(s) from_sums(deep == 4 ? s : add_neighbours(s))
#define TOTAL(n)                                                          \
    {                                                                     \
        floats sum = load(total[n] + i);                                  \
        sum = multiply_add(WHOLE(join_sums(a##n, b##n)), scale, sum);     \
        if (bytes == 3) sum = multiply_add(WHOLE(c##n), last_scale, sum); \
        store(total[n] + i, sum);                                         \
    }
        FOR_BYTE_N(TOTAL)
    }
}

/* For a compiler, a function each. */
#define TILE(name, stored, bytes, deep)                                                                     \
    static __attribute__((noinline)) void name(const struct job* j, const int8_t* weights, int64_t stride,  \
                                               int64_t step, int64_t block, int64_t m, const int8_t* ahead, \
                                               float (*total)[PADDED_M]) {                                  \
        add_bytes(j, weights, stride, step, stored, block, m, ahead, bytes, deep, total);                   \
    }
TILE(tile_of_half, 0, 2, 4)
TILE(tile_of_half_stored, 1, 2, 4)
TILE(tile_of_half_few, 0, 2, 8)
TILE(tile_of_half_few_stored, 1, 2, 8)
TILE(tile_of_float, 0, 3, 4)
TILE(tile_of_float_stored, 1, 3, 4)
TILE(tile_of_float_few, 0, 3, 8)
TILE(tile_of_float_few_stored, 1, 3, 8)
#undef TILE

static void multiply_bytes(const struct job* j, const panel_t* weights, int64_t stride, int64_t step, int64_t block,
                           int64_t m, const int8_t* ahead, float (*total)[PADDED_M]) {
    static void (*const tiles[2][2][2])(const struct job*, const int8_t*, int64_t, int64_t, int64_t, int64_t,
                                        const int8_t*, float (*)[PADDED_M]) = {
        {{tile_of_half, tile_of_half_stored}, {tile_of_half_few, tile_of_half_few_stored}},
        {{tile_of_float, tile_of_float_stored}, {tile_of_float_few, tile_of_float_few_stored}},
    };
    tiles[byte_tiles(j) - 2][j->width < PADDED_M][step == 64](j, weights, stride, step, block, m, ahead, total);
}
#endif

#ifdef AMX
typedef int32_t products[3 * TILE_M]; /* of a weight row and all digits of 16 rows of x, in their places */

/* product[n] = weights · digits, of 16 weight rows. They lie `stride` bytes apart, and their parts of 64 columns `step`
   bytes. Each step fetches `share` lines from `ahead` on. */
static void multiply_digits(const panel_t* weights, int64_t stride, int64_t step, const panel_t* x, int tiles,
                            int64_t steps, int64_t share, const int8_t* ahead, products* product) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    for (int64_t i = 0; i < steps; i++, weights += step, x += tiles * 1024) {
        _tile_loadd(4, weights, stride);
        _tile_loadd(5, x, 64);
        _tile_dpbssd(0, 4, 5);
        if (tiles > 1) {
            _tile_loadd(6, x + 1024, 64);
            _tile_dpbssd(1, 4, 6);
        }
        if (tiles > 2) {
            _tile_loadd(7, x + 2048, 64);
            _tile_dpbssd(2, 4, 7);
        }
        for (int64_t n = 0; n < share; n++, ahead += LINE) __builtin_prefetch(ahead, 0, 2);
    }
    _tile_stored(0, product[0], sizeof *product);
    _tile_stored(1, product[0] + 16, sizeof *product);
    _tile_stored(2, product[0] + 32, sizeof *product);
}

/* The same of two digits for 32 weight rows, which share what is loaded of x. */
static void multiply_two_digits(const panel_t* weights, int64_t stride, int64_t step, const panel_t* x, int64_t steps,
                                int64_t share, const int8_t* ahead, products* product) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < steps; i++, weights += step, x += 2048) {
        _tile_loadd(4, weights, stride);
        _tile_loadd(6, x, 64);
        _tile_loadd(5, weights + 16 * stride, stride);
        _tile_loadd(7, x + 1024, 64);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
        for (int64_t n = 0; n < share; n++, ahead += LINE) __builtin_prefetch(ahead, 0, 2);
    }
    _tile_stored(0, product[0], sizeof *product);
    _tile_stored(1, product[0] + 16, sizeof *product);
    _tile_stored(2, product[16], sizeof *product);
    _tile_stored(3, product[16] + 16, sizeof *product);
}

/* sums[n, m] += weights · digits, for 16 rows of x, and 16 weight rows if these are all, else 32. `stride` and `step`
   are K and 64 in the weight itself, and 64 and 64 · tile_n in a panel. Of the weight itself 16 rows side by side are
   left to the hardware, which on a Xeon was about as fast as the best of many ways to prefetch. More than 16 rows of x
   take longer, and meanwhile fetch other weight rows from `ahead` on. */
static void multiply_tile(const struct job* j, const panel_t* weights, int64_t stride, int64_t step, int64_t block,
                          int64_t m, const int8_t* ahead, float (*sums)[PADDED_M]) {
    const int64_t steps = block_columns(j, block) / 64, tiles = j->padded_M / TILE_M;
    const int64_t share = step == 64 && tiles > 1 ? 16 / tiles : 0; /* lines that 16 weight rows fetch in a step */
    const int apart = next_digit(j);
    const panel_t* x = tile_of(j, m, block);
    const float* scale = j->digit_scale + block * j->planes * j->padded_M + m;
    ahead += m / TILE_M * steps * 2 * share * LINE;
    _Alignas(64) products product[TILE_N];
    if (j->tile_n == TILE_N && j->planes == 2)
        multiply_two_digits(weights, stride, step, x, steps, 2 * share, ahead, product);
    else
        for (int64_t n = 0; n < j->tile_n; n += 16, ahead += steps * share * LINE)
            multiply_digits(weights + n * stride, stride, step, x, byte_tiles(j), steps, share, ahead, product + n);
    for (int64_t n = 0; n < j->tile_n; n++) /* in vectors by hand: a compiler makes a loop over single numbers of it */
        for (int i = 0; i < 16; i += FLOATS) { /* scales are 0 where x has no row */
            floats sum = load(sums[n] + i);
            for (int plane = 0; plane < j->planes; plane++) {
                floats of_plane = load_int32(product[n] + plane * apart + i);
                sum = multiply_add(of_plane, load(scale + plane * j->padded_M + i), sum);
            }
            store(sums[n] + i, sum);
        }
}
#elif defined(BYTE_TILES)
#define multiply_tile multiply_bytes
#else
/* total[n, m] += weights · digits, for the TILE_N rows of a panel and TILE_M rows of x. */
static void multiply_tile(const struct job* j, const panel_t* panel, int64_t stride, int64_t step, int64_t block,
                          int64_t m, const int8_t* ahead, float (*total)[PADDED_M]) {
    int64_t columns = block_columns(j, block);
    (void)step, (void)ahead;
    for (int plane = 0; plane < j->planes; plane++) {
        const panel_t* x = j->digits + (plane * j->padded_M + m) * j->padded_K + block * j->block;
        const float* scale = j->digit_scale + (block * j->planes + plane) * j->padded_M + m;
        sums sum[TILE_N][TILE_M];
        for (int n = 0; n < TILE_N; n++)
            for (int i = 0; i < TILE_M; i++) sum[n][i] = no_sums();
        for (int64_t k = 0; k < columns; k += LANES) {
            digits w[TILE_N];
            for (int n = 0; n < TILE_N; n++) {
                w[n] = load_digits(panel + n * stride + k);
                KEEP(w[n]);
            }
            for (int i = 0; i < TILE_M; i++) {
                digits row = load_digits(x + i * j->padded_K + k);
                KEEP(row);
                for (int n = 0; n < TILE_N; n++) {
                    sum[n][i] = add_products(sum[n][i], w[n], row);
                    KEEP(sum[n][i]);
                }
            }
        }
        for (int n = 0; n < TILE_N; n++)
            for (int i = 0; i < TILE_M; i++) total[n][i] += scale[i] * total_sums(sum[n][i]);
    }
}
#endif

#ifdef PAIRS
/* ---- Many rows with half as many products ----
   Where additions are cheaper than products, two products become one with two additions (Winograd, A New Algorithm for
   Inner Products, 1968):  x0·w0 + x1·w1 = (x0 + w1)·(x1 + w0) - x0·x1 - w0·w1.  The last two are summed once for each
   row of x and each weight row. Pairs are the columns k and k + 2 of four, so that a lane of 32 bits holds two numbers
   of neighbouring columns. Sums may wrap around: what comes out is below 2^31. Digits have 16 bits; what they leave of
   floats has 8 bits and is multiplied as bytes. */

/* Digits of 16 rows of x from m on, of 16 bits: [block][m / 16][k / 2][m % 16][k % 2], followed by those of 8 bits:
   [block][m / 16][k / 4][m % 16][k % 4]. */
static inline int16_t* pairs_of(const struct job* j, int64_t m, int64_t block) {
    int64_t columns = block_columns(j, block);
    return (int16_t*)j->digits + block * j->block * j->padded_M + m * columns;
}
static inline int8_t* rest_of(const struct job* j, int64_t m, int64_t block) {
    return (int8_t*)j->digits + 2 * j->padded_M * j->padded_K + (pairs_of(j, m, block) - (int16_t*)j->digits);
}

static inline sums multiply_pairs(sums s, __m512i a, __m512i b) { return (sums)_mm512_dpwssd_epi32((__m512i)s, a, b); }

/* What sums of 16 rows of x start with: minus the sums of x0·x1, and of 128·x. */
static void start_pairs(const struct job* j, int64_t m, int64_t block) {
    const int64_t columns = block_columns(j, block);
    const int16_t* x = pairs_of(j, m, block);
    int32_t* start = j->start + block * j->planes * j->padded_M + m;
    sums s = no_sums(), rest = no_sums();
    for (int64_t k = 0; k < columns; k += 4, x += 64)
        s = multiply_pairs(s, _mm512_loadu_si512(x), _mm512_loadu_si512(x + 32));
    _mm512_storeu_si512(start, _mm512_sub_epi32(_mm512_setzero_si512(), (__m512i)s));
    if (j->planes == 1) return;
    for (int64_t k = 0; k < columns; k += 4)
        rest = take_multiple(rest, load_digits(rest_of(j, m, block) + k * 16), 128);
    store_sums(start + j->padded_M, rest);
}

/* One block of TILE_N weight rows, [k / 32][TILE_N][32]: of int16, with minus the sums of w0·w1; and unsigned bytes. */
struct pairs_panel {
    _Alignas(64) int16_t pairs[TILE_BLOCK * TILE_N];
    int8_t bytes[TILE_BLOCK * TILE_N];
    int32_t start[16];
};

/* Makes the panel of its bytes, which become unsigned if there are digits of 8 bits to multiply by them. */
static void widen_panel(const struct job* j, struct pairs_panel* panel, int64_t columns) {
    for (int n = 0; n < TILE_N; n++) {
        sums s = no_sums();
        for (int64_t k = n * 32; k < columns * TILE_N; k += 32 * TILE_N) {
            __m512i w = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const void*)(panel->bytes + k)));
            _mm512_storeu_si512(panel->pairs + k, w);
            s = multiply_pairs(s, w, _mm512_srli_epi64(w, 32));
        }
        panel->start[n] = -_mm512_reduce_add_epi32((__m512i)s);
    }
    if (j->planes == 2)
        for (int64_t k = 0; k < columns * TILE_N; k++) panel->bytes[k] ^= -128;
}

/* total[half][n, m] += weights · digits of 16 bits, for TILE_N weight rows and two times 16 rows of x from m on. */
static __attribute__((noinline)) void add_pairs(const struct job* j, const struct pairs_panel* panel, int64_t block,
                                                int64_t m, float (*total)[TILE_N][PADDED_M]) {
    const int64_t columns = block_columns(j, block), at = block * j->planes * j->padded_M + m;
    const int16_t *w = panel->pairs, *x = pairs_of(j, m, block), *y = pairs_of(j, m + 16, block);
    const __m512i x_start = _mm512_loadu_si512(j->start + at), y_start = _mm512_loadu_si512(j->start + at + 16);
    for (int n = 0; n < TILE_N; n++) __builtin_prefetch(total[0][n], 1), __builtin_prefetch(total[1][n], 1);
#define START_PAIRS(n)                                           \
    const __m512i start##n = _mm512_set1_epi32(panel->start[n]); \
    sums a##n = (sums)_mm512_add_epi32(x_start, start##n), b##n = (sums)_mm512_add_epi32(y_start, start##n);
    FOR_BYTE_N(START_PAIRS)
    for (int64_t k = 0; k < columns; k += 32, w += 32 * TILE_N)
        for (int four = 0; four < 32; four += 4, x += 64, y += 64) {
            const __m512i x0 = _mm512_loadu_si512(x), x1 = _mm512_loadu_si512(x + 32);
            const __m512i y0 = _mm512_loadu_si512(y), y1 = _mm512_loadu_si512(y + 32);
#define ADD_PAIRS(n)                                                                        \
    {                                                                                       \
        const __m512i w0 = repeat4(w + n * 32 + four), w1 = repeat4(w + n * 32 + four + 2); \
        a##n = multiply_pairs(a##n, _mm512_add_epi16(x0, w1), _mm512_add_epi16(x1, w0));    \
        b##n = multiply_pairs(b##n, _mm512_add_epi16(y0, w1), _mm512_add_epi16(y1, w0));    \
    }
            FOR_BYTE_N(ADD_PAIRS)
        }
    const floats x_scale = load(j->digit_scale + at), y_scale = load(j->digit_scale + at + 16);
#define TOTAL_PAIRS(n)                                                             \
    store(total[0][n], multiply_add(from_sums(a##n), x_scale, load(total[0][n]))); \
    store(total[1][n], multiply_add(from_sums(b##n), y_scale, load(total[1][n])));
    FOR_BYTE_N(TOTAL_PAIRS)
}

/* The same for digits of 8 bits. */
static __attribute__((noinline)) void add_rest(const struct job* j, const struct pairs_panel* panel, int64_t block,
                                               int64_t m, float (*total)[TILE_N][PADDED_M]) {
    const int64_t columns = block_columns(j, block);
    const int64_t at = (block * j->planes + 1) * j->padded_M + m;
    const int8_t *w = panel->bytes, *x = rest_of(j, m, block), *y = rest_of(j, m + 16, block);
    const sums x_start = load_sums(j->start + at), y_start = load_sums(j->start + at + 16);
#define START_REST(n) sums a##n = x_start, b##n = y_start;
    FOR_BYTE_N(START_REST)
    for (int64_t k = 0; k < columns; k += 32, w += 32 * TILE_N)
        for (int four = 0; four < 32; four += 4, x += 64, y += 64) {
            const digits of_x = load_digits(x), of_y = load_digits(y);
#define ADD_REST(n)                                     \
    {                                                   \
        const digits of_w = repeat4(w + n * 32 + four); \
        a##n = add_products(a##n, of_w, of_x);          \
        b##n = add_products(b##n, of_w, of_y);          \
    }
            FOR_BYTE_N(ADD_REST)
        }
    const floats x_scale = load(j->digit_scale + at), y_scale = load(j->digit_scale + at + 16);
    FOR_BYTE_N(TOTAL_PAIRS)
}
#endif

/* `count` columns of row m of x from `first` on, all of one block, as floats. For int4 the even columns come first,
   then the odd ones, as the high and the low halves of bytes. */
static void read_columns(const struct job* j, int64_t m, int64_t first, int64_t count, float* out) {
    const char* row = (const char*)j->x + m * j->K * size_of(j->x_dtype);
    if (j->bits == 8) {
        read_floats(row + first * size_of(j->x_dtype), j->x_dtype, count, out);
        return;
    }
    float pairs[2 * BLOCK];
    for (int64_t half = j->K / 2, done = 0, part; done < count; done += part) {
        int odd = first + done >= half;
        int64_t from = first + done - (odd ? half : 0);
        part = least(count - done, half - from);
        read_floats(row + 2 * from * size_of(j->x_dtype), j->x_dtype, 2 * part, pairs);
        for (int64_t k = 0; k < part; k++) out[done + k] = pairs[2 * k + odd];
    }
}

/* One block of row m of x as digits of at most `digit_max[plane]`, the next digits `stride` numbers farther, padded
   with zeros to a multiple of LINE; and their scales. What is not finite makes the whole block NaN. */
static void split_block(const struct job* j, int64_t m, int64_t block, const int* digit_max, int16_t* digits,
                        int64_t stride) {
    int64_t padded = block_columns(j, block), count = least(j->block, j->K - block * j->block);
    float rest[BLOCK];
    uint32_t largest = 0; /* as the bits of a float, which order like its size */
    read_columns(j, m, block * j->block, count, rest);
    for (int64_t k = 0; k < count; k++) {
        uint32_t size = bits_of_float(rest[k]) & 0x7fffffff;
        largest = size > largest ? size : largest;
    }
    int finite = largest < 0x7f800000;
    float lift = float_of_bits(largest) < 0x1p-40f ? 0x1p60f : 1; /* keeps the scales of tiny numbers normal */
    float scale = largest ? float_of_bits(largest) * lift / (float)digit_max[0] : 1;
    if (scale < 0x1p-60f) scale = 0x1p-60f; /* subnormal numbers are taken for the smallest normal ones */
    for (int64_t k = 0; k < count; k++) rest[k] *= lift;
    for (int plane = 0; plane < j->planes; plane++, digits += stride) {
        float inverse = 1 / scale;
        memset(digits, 0, (size_t)padded * sizeof *digits);
        if (finite)
            for (int64_t k = 0; k < count; k++) {
                float digit = (rest[k] * inverse + 0x1.8p23f) - 0x1.8p23f; /* rounds to an integer */
                digits[k] = (int16_t)digit;
                rest[k] -= digit * scale;
            }
        j->digit_scale[(block * j->planes + plane) * j->padded_M + m] = finite ? scale / lift : NAN;
        /* About half a unit is left, somewhat more where the division was rounded: the next digit reaches that. */
        if (plane + 1 < j->planes) scale /= (float)(2 * (digit_max[plane + 1] - digit_max[plane + 1] / 64));
    }
}

/* `count` digits, as numbers of `size` bytes. */
static void write_digits(const int16_t* digits, int64_t count, size_t size, void* to) {
    if (size == 2)
        memcpy(to, digits, (size_t)count * 2);
    else
        for (int64_t k = 0; k < count; k++) ((int8_t*)to)[k] = (int8_t)digits[k];
}

#ifdef TILES
/* PADDED_M lines of 64 bytes, in turn 4 bytes of each line; or half as many, and 8 bytes. */
static void interleave(const int8_t* lines, int64_t stride, int deep, int8_t* to) {
    if (deep == 4)
        for (int k = 0; k < 64; k += 4)
            for (int i = 0; i < PADDED_M; i++, to += 4) memcpy(to, lines + i * stride + k, 4);
    else
        for (int k = 0; k < 64; k += 8)
            for (int i = 0; i < PADDED_M / 2; i++, to += 8) memcpy(to, lines + i * stride + k, 8);
}
#endif

/* One block of the rows of x of a tile, from m on, as far as there are so many, as digits in their place. */
static void split_rows(const struct job* j, int64_t m, int64_t block) {
    int64_t rows = least(j->width, j->M - m), columns = block_columns(j, block);
    int16_t digits[3][BLOCK];
#ifdef TILES
    enum { STRIDE = 2 * BLOCK + 64 }; /* bytes; of no power of 2, lest all rows fall on the same place of the cache */
#ifdef AMX
    const int most[] = {PANEL_DIGIT_MAX, PANEL_DIGIT_MAX, PANEL_DIGIT_MAX};
#else
    const int most[] = {TILE_DIGIT_MAX, 127};
#endif
    int8_t lines[3][PADDED_M][STRIDE];
    int deep = 64 / j->width; /* bytes that a sum takes at a time */
    if (rows < j->width) memset(lines, 0, sizeof lines);
    for (int64_t i = 0; i < rows; i++) {
        split_block(j, m + i, block, most, digits[0], BLOCK);
#ifdef AMX
        for (int plane = 0; plane < j->planes; plane++) {
            int64_t place = plane * next_digit(j) + i;
            write_digits(digits[plane], columns, 1, lines[place / TILE_M][place % TILE_M]);
        }
#else
        if (j->pairs)
            memcpy(lines[0][i], digits[0], (size_t)columns * 2);
        else
            for (int64_t k = 0; k < columns; k++) {
                lines[0][i][k] = (int8_t)((digits[0][k] + 128) >> 8);
                lines[1][i][k] = (int8_t)digits[0][k];
            }
        if (j->planes == 2) write_digits(digits[1], columns, 1, lines[2][i]);
#endif
    }
#ifdef PAIRS
    if (j->pairs) {
        for (int64_t k = 0; k < 2 * columns; k += 64)
            interleave(lines[0][0] + k, STRIDE, 4, (int8_t*)pairs_of(j, m, block) + k * 16);
        for (int64_t k = 0; k < columns && j->planes == 2; k += 64)
            interleave(lines[2][0] + k, STRIDE, 4, rest_of(j, m, block) + k * 16);
        start_pairs(j, m, block);
        return;
    }
#endif
    int8_t* to = tile_of(j, m, block);
    for (int64_t k = 0; k < columns; k += 64)
        for (int tile = 0; tile < byte_tiles(j); tile++, to += 64 * j->width)
            interleave(lines[tile][0] + k, STRIDE, deep, to);
#else
    for (int64_t i = 0; i < rows; i++) {
        split_block(j, m + i, block, (int[]){PANEL_DIGIT_MAX, PANEL_DIGIT_MAX, PANEL_DIGIT_MAX}, digits[0], BLOCK);
        for (int plane = 0; plane < j->planes; plane++)
            write_digits(digits[plane], columns, sizeof(panel_t),
                         j->digits + (plane * j->padded_M + m + i) * j->padded_K + block * j->block);
    }
#endif
#ifdef BYTE_TILES
    const int64_t size = 64 * j->width, P = j->padded_M;
    float* scales = j->digit_scale + block * j->planes * P + m;
    for (int plane = 0; plane < j->planes && deep == 8; plane++) /* two sums a row */
        for (int i = PADDED_M - 1; i > 0; i--) scales[plane * P + i] = scales[plane * P + i / 2];
    for (int tile = 0; tile < byte_tiles(j); tile++)
        for (int i = 0; i < PADDED_M; i += FLOATS) { /* sums start with all that 128 added to weights adds to them */
            const int8_t* x = tile_of(j, m, block) + tile * size + 4 * i;
            sums start = no_sums();
            for (int64_t k = 0; k < columns; k += 64, x += byte_tiles(j) * size)
                for (int64_t from = 0; from < size; from += 64)
                    start = take_multiple(start, load_digits(x + from), 128);
            store_sums(j->start + (block * byte_tiles(j) + tile) * P + m + i, start);
        }
#endif
}

/* `rows` weight rows from n on, columns of one block, as digits, 0 where there are none: [tile_n][BLOCK], for tiles
   [k / 64][tile_n][64], for pairs [k / 32][TILE_N][32]. */
static void fill_panel(const struct job* j, int64_t n, int64_t rows, int64_t block, panel_t* panel) {
    int64_t first = block * j->block, columns = least(j->block, j->K - first), bytes = j->K * j->bits / 8;
    int64_t padded = block_columns(j, block);
    for (int64_t i = 0; i < j->tile_n; i++) {
#ifdef TILES
        panel_t to[BLOCK];
#else
        panel_t* to = panel + i * BLOCK;
#endif
        int64_t k = 0;
        if (i < rows) {
            const int8_t* row = j->weight + (n + i) * bytes;
            if (j->bits == 8) {
                for (; k < columns; k++) to[k] = row[first + k];
            } else {
                int64_t high = least(columns, bytes - first); /* columns that are high halves of bytes */
                for (; k < high; k++) to[k] = high_half(row[first + k]);
                for (; k < columns; k++) to[k] = low_half(row[first + k - bytes]);
            }
        }
        for (; k < padded; k++) to[k] = 0;
#ifdef PAIRS
        if (j->pairs) {
            for (k = 0; k < padded; k += 32) memcpy(panel + k * TILE_N + i * 32, to + k, 32);
            continue;
        }
#endif
#ifdef BYTE_TILES
        for (k = 0; k < padded; k++) to[k] ^= -128; /* unsigned: 128 more */
#endif
#ifdef TILES
        for (k = 0; k < padded; k += 64) memcpy(panel + k * j->tile_n + i * 64, to + k, 64);
#endif
    }
}

/* Prefetch what fill_panel will read of weight row n, if there is one. */
static void prefetch_row(const struct job* j, int64_t n, int64_t block) {
    int64_t bytes = j->K * j->bits / 8, first = block * j->block % bytes, columns = least(j->block, bytes - first);
    if (n < j->N)
        for (int64_t k = 0; k < columns; k += LINE) __builtin_prefetch(j->weight + n * bytes + first + k, 0, 2);
}

/* The scales and biases (0 if there are none) of `height` output features from n on, CHUNK at most. */
static void read_vectors(const struct job* j, int64_t n, int64_t height, float* scale, float* bias) {
    read_floats((const char*)j->scale + n * size_of(j->scale_dtype), j->scale_dtype, height, scale);
    if (j->bias)
        read_floats((const char*)j->bias + n * size_of(j->bias_dtype), j->bias_dtype, height, bias);
    else
        memset(bias, 0, (size_t)height * sizeof *bias);
}

/* ---- One row ---- */

/* Bytes of a weight row from `first` on whose numbers are of one block; of int4, the high and the low halves each. */
static int64_t part_bytes(const struct job* j, int64_t first) {
    int64_t bytes = j->K * j->bits / 8, part = least(j->block - first % j->block, bytes - first);
    return j->bits == 8 ? part : least(part, j->block - (first + bytes) % j->block);
}

#ifdef UNSIGNED_WEIGHTS
/* What sums start with, as weights have 128 or 8 added to them. */
static void set_start(const struct job* j) {
    int32_t* start = j->start;
    int64_t bytes = j->K * j->bits / 8;
    for (int64_t first = 0, part; first < bytes; first += part) {
        part = part_bytes(j, first);
        for (int64_t x = first; x < j->K; x += bytes) /* halves of bytes */
            for (int plane = 0; plane < j->planes; plane++, start += FLOATS) {
                sums s = no_sums();
                for (int64_t k = 0; k < part; k += LINE) /* as far as add_part reads */
                    for (int64_t i = k; i < k + LINE; i += LANES)
                        s = take_multiple(s, load_digits(j->row_digits + plane * j->padded_K + x + i),
                                          j->bits == 8 ? 128 : 8);
                store_sums(start, s);
            }
    }
}
static inline sums start_sums(const int32_t* start) { return load_sums(start); }
#else
static void set_start(const struct job* j) { (void)j; }
static inline sums start_sums(const int32_t* start) {
    (void)start;
    return no_sums();
}
#endif

/* s[r] += bytes of `count` weight rows, which lie `stride` bytes apart, times LINE digits from x on; of int4, high
   halves times these and low halves times those from x + low on. */
static inline __attribute__((always_inline)) void add_line(const int8_t* w, int64_t stride, const int count,
                                                           const int halves, const digit_t* x, int64_t low,
                                                           int64_t x_stride, const int planes, sums (*s)[2][3]) {
    for (int i = 0; i < LINE; i += LANES) {
        digits of_x[2][3];
        for (int half = 0; half < halves; half++)
            for (int plane = 0; plane < planes; plane++)
                of_x[half][plane] = load_digits(x + half * low + plane * x_stride + i);
        for (int r = 0; r < count; r++) {
            digits bytes = load_int8(w + r * stride + i);
            for (int half = 0; half < halves; half++) {
                digits of_w = halves == 1 ? bytes : half == 0 ? high_halves(bytes) : low_halves(bytes);
                for (int plane = 0; plane < planes; plane++)
                    s[r][half][plane] = add_products(s[r][half][plane], of_w, of_x[half][plane]);
            }
        }
    }
}

/* sum[r] += weights · digits of `part` bytes from `first` on, as part_bytes says, of `count` weight rows. Their bytes
   begin at w. `ahead`: what to prefetch beside one row, for long, if it is taken in strips. */
static inline __attribute__((always_inline)) void add_part(const struct job* j, const int8_t* w, const int count,
                                                           const int halves, const int planes, int64_t first,
                                                           int64_t part, const int32_t* start, const int8_t* ahead,
                                                           const int strips, floats* sum) {
    const int64_t bytes = halves == 1 ? j->K : j->K / 2;
    const digit_t* x = j->row_digits + first;
    int64_t k = 0;
    sums s[ROWS][2][3];
    for (int r = 0; r < count; r++)
        for (int half = 0; half < halves; half++)
            for (int plane = 0; plane < planes; plane++)
                s[r][half][plane] = start_sums(start + (half * planes + plane) * FLOATS);
    for (; k + LINE <= part; k += LINE) {
        int64_t near = first + k + NEAR < bytes ? NEAR : NEAR + (count - 1) * bytes; /* the next rows' beginnings */
        if (strips)
            __builtin_prefetch(ahead + k);
        else if (count == 1)
            __builtin_prefetch(ahead + k, 0, 0);
        else
            for (int r = 0; r < count; r++) __builtin_prefetch(w + k + r * bytes + near);
        add_line(w + k, bytes, count, halves, x + k, bytes, j->padded_K, planes, s);
    }
    if (k < part) {
        int8_t rest[ROWS][LINE];
        memset(rest, 0, sizeof rest);
        for (int r = 0; r < count; r++) memcpy(rest[r], w + r * bytes + k, (size_t)(part - k));
        add_line(rest[0], LINE, count, halves, x + k, bytes, j->padded_K, planes, s);
    }
    for (int half = 0; half < halves; half++) {
        const float* scale = j->digit_scale + (first + half * bytes) / j->block * planes;
        for (int plane = 0; plane < planes; plane++)
            for (int r = 0; r < count; r++)
                sum[r] = multiply_add(from_sums(s[r][half][plane]), all(scale[plane]), sum[r]);
    }
}

/* line[r] = weight row n + r · x, for `count` weight rows side by side. */
static inline __attribute__((always_inline)) void dot_rows(const struct job* j, int64_t n, const int count,
                                                           const int halves, const int planes, float* line) {
    const int64_t bytes = halves == 1 ? j->K : j->K / 2;
    const int8_t* w = j->weight + n * bytes;
    const int32_t* start = j->start;
    floats sum[ROWS];
    for (int r = 0; r < count; r++) sum[r] = zeros();
    for (int64_t k = 0, part; k < bytes; k += part, start += halves * planes * FLOATS) {
        part = part_bytes(j, k);
        add_part(j, w + k, count, halves, planes, k, part, start, w + k + FAR, 0, sum);
    }
    for (int r = 0; r < count; r++) line[r] = total(sum[r]);
}

/* The same for STRIPS rows one after the other, in strips: the digits of a long row would leave the nearest cache. What
   is fetched meanwhile are the next rows, as they lie in memory. */
static inline __attribute__((always_inline)) void dot_strips(const struct job* j, int64_t n, const int halves,
                                                             const int planes, float* line) {
    const int64_t bytes = halves == 1 ? j->K : j->K / 2;
    const int8_t *w = j->weight + n * bytes, *ahead = w + STRIPS * bytes;
    const int32_t *start = j->start, *next = start;
    floats sum[STRIPS];
    for (int r = 0; r < STRIPS; r++) sum[r] = zeros();
    for (int64_t strip = 0; strip < bytes; strip += STRIP, start = next)
        for (int r = 0; r < STRIPS; r++) {
            next = start;
            for (int64_t k = strip, part; k < least(strip + STRIP, bytes); k += part, ahead += part) {
                part = part_bytes(j, k); /* ends with a strip, which is some blocks long */
                add_part(j, w + r * bytes + k, 1, halves, planes, k, part, next, ahead, 1, sum + r);
                next += halves * planes * FLOATS;
            }
        }
    for (int r = 0; r < STRIPS; r++) line[r] = total(sum[r]);
}

enum way { BY_ROW, BY_ROWS, BY_STRIPS };

/* The same for as many rows as `way` takes. */
static inline __attribute__((always_inline)) void dot_by(const struct job* j, int64_t n, enum way way, const int halves,
                                                         const int planes, float* line) {
    if (way == BY_ROW)
        dot_rows(j, n, 1, halves, planes, line);
    else if (way == BY_ROWS)
        dot_rows(j, n, ROWS, halves, planes, line);
    else
        dot_strips(j, n, halves, planes, line);
}

/* y[begin:end] for one row. */
static void multiply_row(const struct job* j, int64_t begin, int64_t end) {
    enum { OF_HALF = sizeof(digit_t) == 1 ? 2 : 1, OF_FLOAT = OF_HALF + 1 };
    const int rows_of[] = {[BY_ROW] = 1, [BY_ROWS] = ROWS, [BY_STRIPS] = STRIPS};
    const enum way many = !on_amd() ? BY_ROWS : j->K * j->bits / 8 > STRIP ? BY_STRIPS : BY_ROW;
    float scale[CHUNK], bias[CHUNK], line[CHUNK];
    for (int64_t n0 = begin; n0 < end; n0 += CHUNK) {
        int64_t height = least(CHUNK, end - n0);
        enum way way = many;
        for (int64_t n = 0; n < height; n += rows_of[way]) {
            if (height - n < rows_of[way]) way = BY_ROW;
            if (j->bits == 8 && j->planes == OF_HALF)
                dot_by(j, n0 + n, way, 1, OF_HALF, line + n);
            else if (j->bits == 8)
                dot_by(j, n0 + n, way, 1, OF_FLOAT, line + n);
            else if (j->planes == OF_HALF)
                dot_by(j, n0 + n, way, 2, OF_HALF, line + n);
            else
                dot_by(j, n0 + n, way, 2, OF_FLOAT, line + n);
        }
        read_vectors(j, n0, height, scale, bias);
        for (int64_t n = 0; n < height; n++) line[n] = line[n] * scale[n] + bias[n];
        write_floats(line, height, j->x_dtype, j->y, n0);
    }
}

#ifdef PAIRS
/* sums[n, m] of `height` output features from n0 on, PAIR_CHUNK at most, as many as `panels` have weight rows. */
static void multiply_chunk_by_pairs(const struct job* j, int64_t n0, int64_t height, int64_t end,
                                    float (*sums)[TILE_N][PADDED_M], struct pairs_panel* panels) {
    int64_t m_tiles = j->padded_M / PADDED_M, tiles = (height + TILE_N - 1) / TILE_N;
    for (int64_t block = 0; block * j->block < j->padded_K; block++) {
        const int64_t columns = block_columns(j, block);
        int64_t next_n = n0, next_block = block + 1, fetched = 0; /* of weights that are fetched meanwhile */
        if (next_block * j->block >= j->padded_K) next_block = 0, next_n = n0 + PAIR_CHUNK;
        for (int64_t i = 0; i < tiles; i++) {
            fill_panel(j, n0 + i * TILE_N, least(TILE_N, height - i * TILE_N), block, panels[i].bytes);
            widen_panel(j, panels + i, columns);
        }
        for (int64_t m = 0; m < j->M; m += 2 * PADDED_M) {
            const char* next_x = (const char*)pairs_of(j, m + 2 * PADDED_M, block); /* fetched meanwhile */
            int64_t next_bytes = columns * 4 * PADDED_M / tiles;
            for (; fetched * j->M < (m + 2 * PADDED_M) * PAIR_CHUNK && next_n + fetched < end; fetched++)
                prefetch_row(j, next_n + fetched, next_block);
            for (int64_t i = 0; i < tiles; i++) {
                float (*tile)[TILE_N][PADDED_M] = sums + i * m_tiles + m / PADDED_M;
                for (int64_t k = i * next_bytes; k < (i + 1) * next_bytes; k += LINE) __builtin_prefetch(next_x + k);
                add_pairs(j, panels + i, block, m, tile);
                if (j->planes == 2) add_rest(j, panels + i, block, m, tile);
            }
        }
    }
}
#endif

#ifdef __AVX512F__
/* Columns of 16 rows as rows, times `scale` plus `bias`: to[i][n] = rows[n][i] · scale[n] + bias[n]. */
static void turn(const float* const* rows, floats scale, floats bias, float* to, int64_t stride) {
    __m512 one[16], two[16];
    for (int i = 0; i < 16; i += 2) { /* a pair of rows, then four, have their numbers side by side */
        __m512 a = load(rows[i]), b = load(rows[i + 1]);
        one[i] = _mm512_unpacklo_ps(a, b), one[i + 1] = _mm512_unpackhi_ps(a, b);
    }
    for (int i = 0; i < 16; i += 4)
        for (int k = 0; k < 2; k++) {
            __m512d a = _mm512_castps_pd(one[i + k]), b = _mm512_castps_pd(one[i + k + 2]);
            two[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            two[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    for (int i = 0; i < 4; i++) { /* lane l of two[4·r + i] has column 4·l + i of rows 4·r to 4·r + 3 */
        __m512 a = two[i], b = two[4 + i], c = two[8 + i], d = two[12 + i];
        __m512 even0 = _mm512_shuffle_f32x4(a, b, 0x88), odd0 = _mm512_shuffle_f32x4(a, b, 0xdd);
        __m512 even1 = _mm512_shuffle_f32x4(c, d, 0x88), odd1 = _mm512_shuffle_f32x4(c, d, 0xdd);
        store(to + i * stride, multiply_add(_mm512_shuffle_f32x4(even0, even1, 0x88), scale, bias));
        store(to + (4 + i) * stride, multiply_add(_mm512_shuffle_f32x4(odd0, odd1, 0x88), scale, bias));
        store(to + (8 + i) * stride, multiply_add(_mm512_shuffle_f32x4(even0, even1, 0xdd), scale, bias));
        store(to + (12 + i) * stride, multiply_add(_mm512_shuffle_f32x4(odd0, odd1, 0xdd), scale, bias));
    }
}
#endif

/* y[:, begin:end] for several rows. `sums` holds [chunk / tile_n][padded_M / PADDED_M][TILE_N][PADDED_M] floats,
   `panel` TILE_N · BLOCK digits. */
static void multiply_rows(const struct job* j, int64_t begin, int64_t end, int64_t chunk,
                          float (*sums)[TILE_N][PADDED_M], panel_t* panel) {
    const int64_t m_tiles = j->padded_M / PADDED_M, tile_n = j->tile_n;
    float scale[CHUNK], bias[CHUNK], lines[PADDED_M][CHUNK];
    for (int64_t n0 = begin; n0 < end; n0 += chunk) {
        int64_t height = least(chunk, end - n0);
        memset(sums, 0, (size_t)((height + tile_n - 1) / tile_n * m_tiles) * sizeof *sums);
#ifdef PAIRS
        if (j->pairs) multiply_chunk_by_pairs(j, n0, height, end, sums, (struct pairs_panel*)panel);
#endif
        for (int64_t block = 0; block * j->block < j->padded_K && !j->pairs; block++)
            for (int64_t group = 0; group < j->M; group += GROUP)
                for (int64_t n = n0; n < n0 + height; n += tile_n) {
                    int64_t rows = least(tile_n, n0 + height - n), stride = BLOCK, step = TILE_K;
                    int64_t last = least(group + GROUP, j->M), next_n = n + tile_n, next_block = block, fetched = 0;
                    const panel_t* weights = panel;
                    /* Stored weights of the next chunk are fetched as they lie in memory, not in many streams. */
                    const int8_t* ahead =
                        j->weight + (n0 + chunk) * j->K + block * j->block * chunk + (n - n0) * block_columns(j, block);
                    if (next_n >= n0 + height) next_block++, next_n = n0;
                    if (next_block * j->block >= j->K) next_block = 0, next_n = n0 + chunk;
#ifdef TILES
                    if (j->M <= STORED_M && j->bits == 8 && rows == tile_n && j->K == j->padded_K) {
                        weights = j->weight + n * j->K + block * j->block;
                        stride = j->K;
                    } else {
                        fill_panel(j, n, rows, block, panel);
                        stride = 64;
                        step = 64 * tile_n;
                    }
#else
                    fill_panel(j, n, rows, block, panel);
#endif
                    for (int64_t m = group; m < last; m += TILE_M) {
                        float (*tile)[PADDED_M] = sums[(n - n0) / tile_n * m_tiles + m / PADDED_M];
                        for (; weights == panel && fetched * (last - group) < (m + TILE_M - group) * tile_n; fetched++)
                            prefetch_row(j, next_n + fetched, next_block);
                        multiply_tile(j, weights, stride, step, block, m, ahead,
                                      (float (*)[PADDED_M]) & tile[0][m % PADDED_M]);
                    }
                }
        read_vectors(j, n0, height, scale, bias);
        for (int64_t m0 = 0; m0 < j->M; m0 += PADDED_M) { /* sums are [n, m], y is [m, n] */
            int64_t n = 0;
#ifdef __AVX512F__
            for (; j->width == PADDED_M && n + FLOATS <= height; n += FLOATS) {
                const float* rows[FLOATS];
                for (int i = 0; i < FLOATS; i++)
                    rows[i] = sums[(n + i) / tile_n * m_tiles + m0 / PADDED_M][(n + i) % tile_n];
                turn(rows, load(scale + n), load(bias + n), lines[0] + n, CHUNK);
            }
#endif
            for (; n < height; n++) {
                const float* row = sums[n / tile_n * m_tiles + m0 / PADDED_M][n % tile_n];
                for (int i = 0; i < j->width; i++) lines[i][n] = row[i * PADDED_M / j->width] * scale[n] + bias[n];
            }
            for (int64_t m = m0; m < least(m0 + PADDED_M, j->M); m++)
                write_floats(lines[m - m0], height, j->x_dtype, j->y, m * j->N + n0);
        }
    }
}

#ifdef AMX
static void start_tiles(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = 16;
    __asm__ volatile("" ::"r"(&config) : "memory"); /* gcc 12 believes that only 8 bytes of it are read */
    _tile_loadconfig(&config);
}
static void stop_tiles(void) { _tile_release(); }
#else
static void start_tiles(void) {}
static void stop_tiles(void) {}
#endif

/* y = x · (scale · weight)ᵀ + bias. x and y have x_dtype; weight is int8, or int4 with the even column in the high half
   of a byte; scale [N] and bias [N] (or NULL) have dtypes of their own. Returns OK or NO_MEMORY. */
int chatglm_linear(const void* x, int x_dtype, const int8_t* weight, int bits, const void* scale, int scale_dtype,
                   const void* bias, int bias_dtype, void* y, int64_t M, int64_t N, int64_t K, int threads) {
    int one = M == 1;
    threads = of_threads(threads, M * N * K);
    for (int64_t m = 0; m < M; m += M_AT_ONCE) { /* the rows that are held as digits at once */
        struct job j = {
            .x = (const char*)x + m * K * size_of(x_dtype),
            .x_dtype = x_dtype,
            .weight = weight,
            .bits = bits,
            .scale = scale,
            .scale_dtype = scale_dtype,
            .bias = bias,
            .bias_dtype = bias_dtype,
            .y = (char*)y + m * N * size_of(x_dtype),
            .M = least(M - m, M_AT_ONCE),
            .N = N,
            .K = K,
            .width = PADDED_M,
            .tile_n = TILE_N,
            .padded_K = round_up(K, LINE),
            .block = BLOCK,
        };
#ifdef PAIRS
        j.pairs = j.M > PADDED_M && on_amd();
#endif
#ifdef BYTE_TILES
        if (!one) j.block = TILE_BLOCK;
        if (j.M <= PADDED_M / 2) j.width = PADDED_M / 2;
#endif
#ifdef AMX
        if (!one && j.M <= TILE_M) j.tile_n = 16; /* instead of 32: see multiply_tile */
#endif
        int blocks = (int)((j.padded_K + j.block - 1) / j.block);
        size_t digit_size = one ? sizeof(digit_t) : JOINED ? 2 : sizeof(panel_t);
        int64_t chunk = j.pairs ? PAIR_CHUNK : j.M <= 32 ? round_up(FEW_CHUNK, j.tile_n) : CHUNK;
        j.planes = digits_of(x_dtype, digit_size);
        j.padded_M = one ? 1 : round_up(j.M, j.pairs ? 2 * PADDED_M : PADDED_M);
        /* For each thread: sums; a panel of weights. For all: digits, their scales, and what sums start with. */
        size_t sums_size = one ? 0 : (size_t)(chunk / j.tile_n * TILE_N * j.padded_M) * 4;
        size_t panel_size = one ? 0 : (size_t)round_up(TILE_N * BLOCK * sizeof(panel_t), 64);
#ifdef PAIRS
        if (j.pairs) panel_size = PAIR_CHUNK / TILE_N * sizeof(struct pairs_panel);
#endif
        size_t own_size = sums_size + panel_size, all_own = (size_t)threads * own_size;
        size_t scale_size = (size_t)round_up(blocks * j.planes * j.padded_M * 4, 64);
        size_t start_size = one ? (size_t)(2 * blocks * j.planes * FLOATS) * 4 : 2 * scale_size;
        size_t digits_size = (size_t)(j.planes * j.padded_M * j.padded_K) * digit_size;
        size_t beyond = LINE * sizeof(digit_t); /* read after one row's digits, and multiplied by zeros */
        size_t all = all_own + scale_size + start_size + digits_size + beyond;
        char* memory = aligned_alloc(64, round_up((int64_t)all, 64));
        if (!memory) return NO_MEMORY;
        j.digit_scale = (float*)(memory + all_own);
        j.start = (int32_t*)(memory + all_own + scale_size);
        char* digits = memory + all_own + scale_size + start_size;
        if (one)
            j.row_digits = (digit_t*)digits;
        else
            j.digits = (panel_t*)digits;
        memset(j.digit_scale, 0, scale_size); /* of the rows that pad M */
        if (one) {
            memset(digits + digits_size, 0, beyond);
            for (int block = 0; block < blocks; block++) {
                int16_t split[3][BLOCK];
                split_block(&j, 0, block, (int[]){DIGIT_MAX, DIGIT_MAX, DIGIT_MAX}, split[0], BLOCK);
                digit_t* to = j.row_digits + block * BLOCK;
                for (int plane = 0; plane < j.planes; plane++, to += j.padded_K)
                    write_digits(split[plane], block_columns(&j, block), sizeof(digit_t), to);
            }
            set_start(&j);
        }
#pragma omp parallel num_threads(threads)
        {
            int64_t tiles = (N + j.tile_n - 1) / j.tile_n;
            int64_t begin = part_begin(tiles) * j.tile_n, end = least(part_end(tiles) * j.tile_n, N);
            if (one)
                multiply_row(&j, begin, end);
            else {
                char* own = memory + (size_t)thread_number() * own_size;
                int64_t parts = blocks * (j.padded_M / PADDED_M); /* also of those that pad M */
                for (int64_t i = part_begin(parts); i < part_end(parts); i++)
                    split_rows(&j, i / blocks * PADDED_M, i % blocks);
#pragma omp barrier
                start_tiles();
                multiply_rows(&j, begin, end, chunk, (float (*)[TILE_N][PADDED_M])own, (panel_t*)(own + sums_size));
                stop_tiles();
            }
        }
        free(memory);
    }
    return OK;
}
