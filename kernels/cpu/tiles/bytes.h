/* Byte tiles: unsigned int8 weights times signed bytes (VNNI), two bytes to a 16-bit limb, 256 · high + low.

   Shapes: BYTE_N weight rows by 16 sums. For more than 8 rows of x each sum takes 4 columns at a time, and limbs lie as
   [block][m / 16][k / 64][tile][k / 4 % 16][m % 16][k % 4]; for fewer, a row has two sums, of 4 columns each, and limbs
   lie as [block][k / 64][tile][k / 8 % 8][m][k % 8]. The tiles are high bytes, low bytes and, for float32, an int8
   limb. A panel is [k / 64][TILE_N][64]; up to STORED_M rows read int8 weights where they are stored. Alignment: none.
 */
#pragma once

enum {
    TILE_N = BYTE_N,    /* weight rows of a tile */
    TILE_M = 16,        /* rows of x of a tile */
    CHUNK = 256,        /* output features that a thread takes at once, at most */
    FEW_CHUNK = 16,     /* the same of few rows: a vector of results */
    GROUP = 256,        /* rows whose limbs of a block stay in the cache beside weights */
    STORED_M = 16,      /* rows, at most, that read int8 weights where they are stored: too few for a panel */
    PANEL_STRIDE = 64,  /* from a panel's row to its next */
    LIMB_SIZE = 2,      /* bytes of a limb: two make the first */
    TILE_BLOCK = 512,   /* columns of a block */
    LIMB16_MAX = 32639, /* so that a weight more still fits 16 bits */
};
_Static_assert(LIMB16_MAX + 128 <= 32767, "pairs add a weight to a limb");
_Static_assert((int64_t)(LIMB16_MAX + 128) * 128 * TILE_BLOCK <= INT32_MAX, "the sum over a block is exact");
_Static_assert(TILE_BLOCK <= (int64_t)BLOCK && TILE_BLOCK % 64 == 0, "split_block has room for a block");
typedef int8_t panel_t;
#include "interleave.h"
#include "panels.h"

/* Tiles of bytes: high bytes, low bytes, and the limb of 8 bits if there is one. */
static inline int byte_tiles(const struct job* j) { return j->planes + 1; }

/* The first byte of a block of 16 rows from m on. */
static inline int8_t* tile_of(const struct job* j, int64_t m, int64_t block) {
    int64_t columns = block_columns(j, block);
    return (int8_t*)j->limbs + (block * j->block * j->padded_M + m / 16 * 16 * columns) * byte_tiles(j);
}

static struct plan bytes_plan(struct job* j) {
    j->block = TILE_BLOCK;
    if (j->M <= PADDED_M / 2) j->width = PADDED_M / 2;
    j->padded_M = round_up(j->M, PADDED_M);
    return (struct plan){
        .chunk = j->M <= 32 ? round_up(FEW_CHUNK, j->tile_n) : CHUNK,
        .panel_size = (size_t)round_up(TILE_N * BLOCK * sizeof(panel_t), 64),
    };
}

static void bytes_split_rows(const struct job* j, int64_t m, int64_t block) {
    int64_t rows = min_i64(j->width, j->M - m), columns = block_columns(j, block);
    int16_t limbs[3][BLOCK];
    int8_t lines[3][PADDED_M][LINE_STRIDE];
    if (rows < j->width) memset(lines, 0, sizeof lines);
    for (int64_t i = 0; i < rows; i++) {
        split_block(j, m + i, block, (int[]){LIMB16_MAX, 127}, limbs[0], BLOCK);
        for (int64_t k = 0; k < columns; k++) {
            lines[0][i][k] = (int8_t)((limbs[0][k] + 128) >> 8);
            lines[1][i][k] = (int8_t)limbs[0][k];
        }
        if (j->planes == 2) narrow_limbs(limbs[1], columns, 1, lines[2][i]);
    }
    interleave_lines(j, lines[0][0], columns, byte_tiles(j), tile_of(j, m, block));
    const int64_t size = 64 * j->width, P = j->padded_M;
    float* scales = j->limb_scale + block * j->planes * P + m;
    for (int plane = 0; plane < j->planes && j->width < PADDED_M; plane++) /* two sums a row */
        for (int i = PADDED_M - 1; i > 0; i--) scales[plane * P + i] = scales[plane * P + i / 2];
    for (int tile = 0; tile < byte_tiles(j); tile++)
        for (int i = 0; i < PADDED_M; i += FLOATS) { /* minus what the 128 added to weights adds */
            const int8_t* x = tile_of(j, m, block) + tile * size + 4 * i;
            sums start = no_sums();
            for (int64_t k = 0; k < columns; k += 64, x += byte_tiles(j) * size)
                for (int64_t from = 0; from < size; from += 64)
                    start = subtract_multiple(start, load_limbs(x + from), 128);
            store_sums(j->start + (block * byte_tiles(j) + tile) * P + m + i, start);
        }
}

static void bytes_fill_panel(const struct job* j, int64_t n, int64_t rows, int64_t block, panel_t* panel) {
    int64_t first = block * j->block, columns = min_i64(j->block, j->K - first);
    int64_t padded = block_columns(j, block);
    for (int64_t i = 0; i < j->tile_n; i++) {
        panel_t to[BLOCK];
        unpack_row(j, n + i, i < rows, first, columns, padded, to);
        for (int64_t k = 0; k < padded; k++) to[k] ^= -128; /* unsigned: 128 more */
        for (int64_t k = 0; k < padded; k += 64) memcpy(panel + k * j->tile_n + i * 64, to + k, 64);
    }
}

/* total[n, i] += weights · limbs for BYTE_N weight rows and PADDED_M sums, which take `depth` columns at a time. Weight
   rows lie `stride` bytes apart, their parts of 64 columns `step` bytes. `stored`: weights are signed, as stored, and
   the next are prefetched from `ahead` on. `bytes`: byte_tiles. */
static inline __attribute__((always_inline)) void add_bytes(const struct job* j, const int8_t* weights, int64_t stride,
                                                            int64_t step, const int stored, int64_t block, int64_t m,
                                                            const int8_t* ahead, const int bytes, const int depth,
                                                            float (*total)[PADDED_M]) {
    const int64_t size = 64 * (64 / depth); /* of a plane's 64 columns */
    const int64_t P = j->padded_M;
    for (int i = 0; i < PADDED_M; i += FLOATS) {
        const int8_t *x = tile_of(j, m, block) + 4 * i, *w = weights;
        const int32_t* start = j->start + block * bytes * P + m + i;
        const sums a = load_sums(start), b = load_sums(start + P), c = load_sums(start + (bytes - 1) * P);
        /* Not an array: gcc 12 would keep it in memory. */
#define START(n) sums a##n = a, b##n = b, c##n = c;
        FOR_BYTE_N(START)
        for (int64_t k = block_columns(j, block); k > 0; k -= 64, w += step, x += bytes * size) {
            for (int part = 0; part < 64; part += depth) {
                if (stored && i == 0 && part % (64 / BYTE_N) == 0) { /* spread out, or loads would wait */
                    __builtin_prefetch(w + part / (64 / BYTE_N) * stride + NEAR / 4);
                    __builtin_prefetch(ahead, 0, 2);
                    ahead += CACHE_LINE;
                }
                const int8_t *from = w + part, *limb = x + 64 / depth * part;
                const limbs x_a = load_limbs(limb), x_b = load_limbs(limb + size);
                const limbs x_c = load_limbs(limb + (bytes - 1) * size);
#define ADD(n)                                                                                   \
    {                                                                                            \
        limbs of_w = depth == 4 ? broadcast4(from + n * stride) : broadcast8(from + n * stride); \
        if (stored) of_w = flip_signs(of_w);                                                     \
        a##n = add_products(a##n, of_w, x_a);                                                    \
        b##n = add_products(b##n, of_w, x_b);                                                    \
        if (bytes == 3) c##n = add_products(c##n, of_w, x_c);                                    \
    }
                FOR_BYTE_N(ADD)
            }
        }
        const float* scales = j->limb_scale + block * (bytes - 1) * P + m + i;
        const floats scale = load(scales), last_scale = load(scales + (bytes - 2) * P);
#define WHOLE(s) from_sums(depth == 4 ? s : add_lane_pairs(s))
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

/* A function for each case, so that the compiler knows the constants. */
#define BYTE_TILE(name, stored, bytes, depth)                                                               \
    static __attribute__((noinline)) void name(const struct job* j, const int8_t* weights, int64_t stride,  \
                                               int64_t step, int64_t block, int64_t m, const int8_t* ahead, \
                                               float (*total)[PADDED_M]) {                                  \
        add_bytes(j, weights, stride, step, stored, block, m, ahead, bytes, depth, total);                  \
    }
BYTE_TILE(byte_tile_half, 0, 2, 4)
BYTE_TILE(byte_tile_half_stored, 1, 2, 4)
BYTE_TILE(byte_tile_half_few, 0, 2, 8)
BYTE_TILE(byte_tile_half_few_stored, 1, 2, 8)
BYTE_TILE(byte_tile_float, 0, 3, 4)
BYTE_TILE(byte_tile_float_stored, 1, 3, 4)
BYTE_TILE(byte_tile_float_few, 0, 3, 8)
BYTE_TILE(byte_tile_float_few_stored, 1, 3, 8)
#undef BYTE_TILE

static void bytes_multiply_tile(const struct job* j, const panel_t* weights, int64_t stride, int64_t step,
                                int64_t block, int64_t m, const int8_t* ahead, float (*total)[PADDED_M]) {
    static void (*const tiles[2][2][2])(const struct job*, const int8_t*, int64_t, int64_t, int64_t, int64_t,
                                        const int8_t*, float (*)[PADDED_M]) = {
        {{byte_tile_half, byte_tile_half_stored}, {byte_tile_half_few, byte_tile_half_few_stored}},
        {{byte_tile_float, byte_tile_float_stored}, {byte_tile_float_few, byte_tile_float_few_stored}},
    };
    tiles[byte_tiles(j) - 2][j->width < PADDED_M][step == 64](j, weights, stride, step, block, m, ahead, total);
}

static void bytes_multiply_chunk(const struct job* j, int64_t n0, int64_t height, int64_t end, int64_t chunk,
                                 float (*sums)[TILE_N][PADDED_M], void* panel) {
    (void)end;
    multiply_by_panels(j, n0, height, chunk, sums, panel, bytes_fill_panel, bytes_multiply_tile);
}

static int tiles_allowed(void) { return 1; }
static void start_tiles(void) {}
static void stop_tiles(void) {}
