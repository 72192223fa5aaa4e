/* The matrix unit (AMX-INT8): tiles of 16 rows of 64 bytes, int8 limbs.

   Shapes: a tile of sums has 16 weight rows and 16 places; 32 weight rows and 32 places are multiplied at once. Limbs
   lie as [block][m / 16][k / 64][tile][k / 4 % 16][place][k % 4]; limb p of row m has the place
   p · limb_stride + m % 16 of all tiles. A panel is [k / 64][tile_n][64]; up to STORED_M rows read int8 weights where
   they are stored. Threads: each configures its own unit. Alignment: tiles of sums 64 bytes, the rest none.
   Source: Intel 64 and IA-32 Architectures Optimization Reference Manual, chapter on AMX. */
#pragma once

enum {
    TILE_N = 32,       /* weight rows of a tile */
    TILE_M = 16,       /* rows of x of a tile */
    CHUNK = 256,       /* output features that a thread takes at once, at most */
    FEW_CHUNK = 16,    /* the same of few rows: a vector of results */
    GROUP = 512,       /* rows whose limbs of a block stay in the cache beside weights */
    STORED_M = 32,     /* rows, at most, that read int8 weights where they are stored: too few for a panel */
    PANEL_STRIDE = 64, /* from a panel's row to its next */
    LIMB_SIZE = 1,     /* bytes of a limb */
};
_Static_assert(TILE_M == 16 && TILE_N == 2 * 16 && PADDED_M == 16, "the unit's tiles have 16 rows");
_Static_assert(BLOCK * 127 * 128 <= INT32_MAX && BLOCK % 64 == 0, "the sum over a block of whole tiles is exact");
typedef int8_t panel_t;
#undef INSTRUCTIONS
#define INSTRUCTIONS "AMX"
#include "interleave.h"
#include "panels.h"
#ifdef EMULATE_AMX
#include "amx_emulated.h"
#else
#include "amx_system.h"
#endif

static struct plan amx_plan(struct job* j) {
    if (j->M <= TILE_M) j->tile_n = 16; /* instead of 32: see amx_multiply_tile */
    j->padded_M = round_up(j->M, PADDED_M);
    return (struct plan){
        .chunk = j->M <= 32 ? round_up(FEW_CHUNK, j->tile_n) : CHUNK,
        .panel_size = (size_t)round_up(TILE_N * BLOCK * sizeof(panel_t), 64),
    };
}

/* Places from a limb to the next of the same row. Fewer than 16 rows leave no gap: two limbs of 8 rows make one tile.
 */
static inline int limb_stride(const struct job* j) { return (int)min_i64(j->M, TILE_M); }
static inline int byte_tiles(const struct job* j) { return (j->planes * limb_stride(j) + TILE_M - 1) / TILE_M; }

/* The first byte of a block of 16 rows from m on. */
static inline int8_t* tile_of(const struct job* j, int64_t m, int64_t block) {
    int64_t columns = block_columns(j, block);
    return (int8_t*)j->limbs + (block * j->block * j->padded_M + m / 16 * 16 * columns) * byte_tiles(j);
}

static void amx_split_rows(const struct job* j, int64_t m, int64_t block) {
    int64_t rows = min_i64(j->width, j->M - m), columns = block_columns(j, block);
    int16_t limbs[3][BLOCK];
    int8_t lines[3][PADDED_M][LINE_STRIDE];
    if (rows < j->width) memset(lines, 0, sizeof lines);
    for (int64_t i = 0; i < rows; i++) {
        split_block(j, m + i, block, (int[]){127, 127, 127}, limbs[0], BLOCK);
        for (int plane = 0; plane < j->planes; plane++) {
            int64_t place = plane * limb_stride(j) + i;
            narrow_limbs(limbs[plane], columns, 1, lines[place / TILE_M][place % TILE_M]);
        }
    }
    interleave_lines(j, lines[0][0], columns, byte_tiles(j), tile_of(j, m, block));
}

static void amx_fill_panel(const struct job* j, int64_t n, int64_t rows, int64_t block, panel_t* panel) {
    int64_t first = block * j->block, columns = min_i64(j->block, j->K - first);
    int64_t padded = block_columns(j, block);
    for (int64_t i = 0; i < j->tile_n; i++) {
        panel_t to[BLOCK];
        unpack_row(j, n + i, i < rows, first, columns, padded, to);
        for (int64_t k = 0; k < padded; k += 64) memcpy(panel + k * j->tile_n + i * 64, to + k, 64);
    }
}

typedef int32_t products[3 * TILE_M]; /* sums of a weight row and all limbs of 16 rows, by place */

/* product[n] = weights · limbs, of 16 weight rows. They lie `stride` bytes apart, their parts of 64 columns `step`
   bytes. Each step prefetches `share` cache lines from `ahead` on. */
static void multiply_16_rows(const panel_t* weights, int64_t stride, int64_t step, const panel_t* x, int tiles,
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
        for (int64_t n = 0; n < share; n++, ahead += CACHE_LINE) __builtin_prefetch(ahead, 0, 2);
    }
    _tile_stored(0, product[0], sizeof *product);
    _tile_stored(1, product[0] + 16, sizeof *product);
    _tile_stored(2, product[0] + 32, sizeof *product);
}

/* The same of two limbs and 32 weight rows, which share the tiles of x. */
static void multiply_32_rows(const panel_t* weights, int64_t stride, int64_t step, const panel_t* x, int64_t steps,
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
        for (int64_t n = 0; n < share; n++, ahead += CACHE_LINE) __builtin_prefetch(ahead, 0, 2);
    }
    _tile_stored(0, product[0], sizeof *product);
    _tile_stored(1, product[0] + 16, sizeof *product);
    _tile_stored(2, product[16], sizeof *product);
    _tile_stored(3, product[16] + 16, sizeof *product);
}

/* sums[n, m] += weights · limbs, for 16 rows of x and tile_n weight rows: 16 for a job of up to 16 rows, else 32.
   `stride` and `step` are K and 64 in the weight itself, 64 and 64 · tile_n in a panel. With up to 16 rows of x the
   hardware prefetches stored weights: on a Xeon as fast as the best software prefetch. With more rows each tile takes
   longer, and prefetches the next weight rows from `ahead` on. */
static void amx_multiply_tile(const struct job* j, const panel_t* weights, int64_t stride, int64_t step, int64_t block,
                              int64_t m, const int8_t* ahead, float (*sums)[PADDED_M]) {
    const int64_t steps = block_columns(j, block) / 64, tiles = j->padded_M / TILE_M;
    const int64_t share =
        step == 64 && tiles > 1 ? 16 / tiles : 0; /* cache lines that 16 weight rows prefetch in a step */
    const int apart = limb_stride(j);
    const panel_t* x = tile_of(j, m, block);
    const float* scale = j->limb_scale + block * j->planes * j->padded_M + m;
    ahead += m / TILE_M * steps * 2 * share * CACHE_LINE;
    _Alignas(64) products product[TILE_N];
    if (j->tile_n == TILE_N && j->planes == 2)
        multiply_32_rows(weights, stride, step, x, steps, 2 * share, ahead, product);
    else
        for (int64_t n = 0; n < j->tile_n; n += 16, ahead += steps * share * CACHE_LINE)
            multiply_16_rows(weights + n * stride, stride, step, x, byte_tiles(j), steps, share, ahead, product + n);
    for (int64_t n = 0; n < j->tile_n; n++)    /* vectors by hand: gcc makes scalar code of the plain loop */
        for (int i = 0; i < 16; i += FLOATS) { /* scales are 0 where x has no row */
            floats sum = load(sums[n] + i);
            for (int plane = 0; plane < j->planes; plane++) {
                floats of_plane = load_int32(product[n] + plane * apart + i);
                sum = multiply_add(of_plane, load(scale + plane * j->padded_M + i), sum);
            }
            store(sums[n] + i, sum);
        }
}

static void amx_multiply_chunk(const struct job* j, int64_t n0, int64_t height, int64_t end, int64_t chunk,
                               float (*sums)[TILE_N][PADDED_M], void* panel) {
    (void)end;
    multiply_by_panels(j, n0, height, chunk, sums, panel, amx_fill_panel, amx_multiply_tile);
}

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
