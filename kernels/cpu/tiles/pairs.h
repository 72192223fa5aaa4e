/* Pair tiles: half as many products, for processors where additions are cheaper (AMD's with AVX512).

   Two products become one and two additions (Winograd, A New Algorithm for Inner Products, 1968):
   x0·w0 + x1·w1 = (x0 + w1)·(x1 + w0) - x0·x1 - w0·w1. The last two are summed once for each row of x and each weight
   row. A pair is columns k and k + 2 of four, so that a lane of 32 bits holds neighbouring columns. Sums may wrap
   around; the result is below 2^31. Limbs have 16 bits; float32 has one more of 8 bits, multiplied as bytes.
   Shapes: TILE_N weight rows by 2 · 16 rows of x; a panel for each tile of a chunk. Alignment: panels 64 bytes. */
#pragma once

enum { PAIR_CHUNK = 256 /* output features that a thread takes at once */ };
_Static_assert(TILE_N <= 16 && FLOATS == 16, "a panel has 16 initial sums, and a vector 16 rows of x");

/* Limbs of 16 rows of x from m on, of 16 bits: [block][m / 16][k / 2][m % 16][k % 2], followed by those of 8 bits:
   [block][m / 16][k / 4][m % 16][k % 4]. */
static inline int16_t* pairs_of(const struct job* j, int64_t m, int64_t block) {
    int64_t columns = block_columns(j, block);
    return (int16_t*)j->limbs + block * j->block * j->padded_M + m * columns;
}

static inline int8_t* rest_of(const struct job* j, int64_t m, int64_t block) {
    return (int8_t*)j->limbs + 2 * j->padded_M * j->padded_K + (pairs_of(j, m, block) - (int16_t*)j->limbs);
}

static inline sums multiply_pairs(sums s, __m512i a, __m512i b) { return (sums)_mm512_dpwssd_epi32((__m512i)s, a, b); }

/* Initial sums of 16 rows of x: minus the sums of x0·x1, and of 128·x. */
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
        rest = subtract_multiple(rest, load_limbs(rest_of(j, m, block) + k * 16), 128);
    store_sums(start + j->padded_M, rest);
}

/* One block of TILE_N weight rows, [k / 32][TILE_N][32]: of int16, with minus the sums of w0·w1; and unsigned bytes. */
struct pairs_panel {
    _Alignas(64) int16_t pairs[TILE_BLOCK * TILE_N];
    int8_t bytes[TILE_BLOCK * TILE_N];
    int32_t start[16];
};

static struct plan pairs_plan(struct job* j) {
    j->block = TILE_BLOCK;
    j->padded_M = round_up(j->M, 2 * PADDED_M);
    return (struct plan){.chunk = PAIR_CHUNK, .panel_size = PAIR_CHUNK / TILE_N * sizeof(struct pairs_panel)};
}

static void pairs_split_rows(const struct job* j, int64_t m, int64_t block) {
    int64_t rows = min_i64(j->width, j->M - m), columns = block_columns(j, block);
    int16_t limbs[3][BLOCK];
    int8_t pairs[PADDED_M][LINE_STRIDE], rest[PADDED_M][LINE_STRIDE];
    if (rows < j->width) memset(pairs, 0, sizeof pairs), memset(rest, 0, sizeof rest);
    for (int64_t i = 0; i < rows; i++) {
        split_block(j, m + i, block, (int[]){LIMB16_MAX, 127}, limbs[0], BLOCK);
        memcpy(pairs[i], limbs[0], (size_t)columns * 2);
        if (j->planes == 2) narrow_limbs(limbs[1], columns, 1, rest[i]);
    }
    for (int64_t k = 0; k < 2 * columns; k += 64)
        interleave(pairs[0] + k, LINE_STRIDE, 4, (int8_t*)pairs_of(j, m, block) + k * 16);
    for (int64_t k = 0; k < columns && j->planes == 2; k += 64)
        interleave(rest[0] + k, LINE_STRIDE, 4, rest_of(j, m, block) + k * 16);
    start_pairs(j, m, block);
}

static void pairs_fill_panel(const struct job* j, int64_t n, int64_t rows, int64_t block, panel_t* panel) {
    int64_t first = block * j->block, columns = min_i64(j->block, j->K - first);
    int64_t padded = block_columns(j, block);
    for (int64_t i = 0; i < j->tile_n; i++) {
        panel_t to[BLOCK];
        unpack_row(j, n + i, i < rows, first, columns, padded, to);
        for (int64_t k = 0; k < padded; k += 32) memcpy(panel + k * TILE_N + i * 32, to + k, 32);
    }
}

/* Fills the panel from its bytes, which become unsigned if limbs of 8 bits follow. */
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

/* total[half][n, m] += weights · limbs of 16 bits, for TILE_N weight rows and 2 · 16 rows of x from m on. */
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
#define ADD_PAIRS(n)                                                                              \
    {                                                                                             \
        const __m512i w0 = broadcast4(w + n * 32 + four), w1 = broadcast4(w + n * 32 + four + 2); \
        a##n = multiply_pairs(a##n, _mm512_add_epi16(x0, w1), _mm512_add_epi16(x1, w0));          \
        b##n = multiply_pairs(b##n, _mm512_add_epi16(y0, w1), _mm512_add_epi16(y1, w0));          \
    }
            FOR_BYTE_N(ADD_PAIRS)
        }
    const floats x_scale = load(j->limb_scale + at), y_scale = load(j->limb_scale + at + 16);
#define TOTAL_PAIRS(n)                                                             \
    store(total[0][n], multiply_add(from_sums(a##n), x_scale, load(total[0][n]))); \
    store(total[1][n], multiply_add(from_sums(b##n), y_scale, load(total[1][n])));
    FOR_BYTE_N(TOTAL_PAIRS)
}

/* The same for limbs of 8 bits. */
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
            const limbs of_x = load_limbs(x), of_y = load_limbs(y);
#define ADD_REST(n)                                       \
    {                                                     \
        const limbs of_w = broadcast4(w + n * 32 + four); \
        a##n = add_products(a##n, of_w, of_x);            \
        b##n = add_products(b##n, of_w, of_y);            \
    }
            FOR_BYTE_N(ADD_REST)
        }
    const floats x_scale = load(j->limb_scale + at), y_scale = load(j->limb_scale + at + 16);
    FOR_BYTE_N(TOTAL_PAIRS)
}

/* sums[n, m] of `height` output features from n0 on, PAIR_CHUNK at most; `panel` is PAIR_CHUNK / TILE_N panels. */
static void pairs_multiply_chunk(const struct job* j, int64_t n0, int64_t height, int64_t end, int64_t chunk,
                                 float (*sums)[TILE_N][PADDED_M], void* panel) {
    struct pairs_panel* panels = panel;
    (void)end, (void)chunk;
    int64_t m_tiles = j->padded_M / PADDED_M, tiles = (height + TILE_N - 1) / TILE_N;
    for (int64_t block = 0; block * j->block < j->padded_K; block++) {
        const int64_t columns = block_columns(j, block);
        for (int64_t i = 0; i < tiles; i++) {
            pairs_fill_panel(j, n0 + i * TILE_N, min_i64(TILE_N, height - i * TILE_N), block, panels[i].bytes);
            widen_panel(j, panels + i, columns);
        }
        for (int64_t m = 0; m < j->M; m += 2 * PADDED_M) {
            const char* next_x = (const char*)pairs_of(j, m + 2 * PADDED_M, block); /* prefetched meanwhile */
            int64_t next_bytes = columns * 4 * PADDED_M / tiles;
            for (int64_t i = 0; i < tiles; i++) {
                float (*tile)[TILE_N][PADDED_M] = sums + i * m_tiles + m / PADDED_M;
                for (int64_t k = i * next_bytes; k < (i + 1) * next_bytes; k += CACHE_LINE)
                    __builtin_prefetch(next_x + k);
                add_pairs(j, panels + i, block, m, tile);
                if (j->planes == 2) add_rest(j, panels + i, block, m, tile);
            }
        }
    }
}
