/* Plain tiles: TILE_N weight rows by TILE_M rows of x in registers, products of two vectors of limbs.

   Limbs are int16, or int8 with NEON's dot product, as [plane][padded_M][padded_K]; a panel is [TILE_N][BLOCK].
   Alignment: none. */
#pragma once

typedef limb_t panel_t;
enum {
    TILE_N = PLAIN_N,                         /* weight rows of a tile */
    TILE_M = PLAIN_M,                         /* rows of x of a tile */
    CHUNK = sizeof(panel_t) == 1 ? 256 : 128, /* output features that a thread takes at once, at most */
    FEW_CHUNK = 16,                           /* the same of few rows: a vector of results */
    GROUP = sizeof(panel_t) == 1 ? 512 : 64,  /* rows whose limbs of a block stay in the cache beside weights */
    STORED_M = 0,                             /* all weights go through panels */
    PANEL_STRIDE = BLOCK,                     /* from a panel's row to its next */
    LIMB_SIZE = sizeof(panel_t),              /* bytes of a limb */
};
#include "panels.h"

static struct plan plain_plan(struct job* j) {
    j->padded_M = round_up(j->M, PADDED_M);
    return (struct plan){
        .chunk = j->M <= 32 ? round_up(FEW_CHUNK, j->tile_n) : CHUNK,
        .panel_size = (size_t)round_up(TILE_N * BLOCK * sizeof(panel_t), 64),
    };
}

static void plain_split_rows(const struct job* j, int64_t m, int64_t block) {
    int64_t rows = min_i64(j->width, j->M - m), columns = block_columns(j, block);
    int16_t limbs[3][BLOCK];
    for (int64_t i = 0; i < rows; i++) {
        split_block(j, m + i, block, (int[]){LIMB_MAX, LIMB_MAX, LIMB_MAX}, limbs[0], BLOCK);
        for (int plane = 0; plane < j->planes; plane++)
            narrow_limbs(limbs[plane], columns, sizeof(panel_t),
                         (panel_t*)j->limbs + (plane * j->padded_M + m + i) * j->padded_K + block * j->block);
    }
}

static void plain_fill_panel(const struct job* j, int64_t n, int64_t rows, int64_t block, panel_t* panel) {
    int64_t first = block * j->block, columns = min_i64(j->block, j->K - first);
    int64_t padded = block_columns(j, block);
    for (int64_t i = 0; i < j->tile_n; i++) unpack_row(j, n + i, i < rows, first, columns, padded, panel + i * BLOCK);
}

/* total[n, m] += weights · limbs, for the TILE_N rows of a panel and TILE_M rows of x. */
static void plain_multiply_tile(const struct job* j, const panel_t* panel, int64_t stride, int64_t step, int64_t block,
                                int64_t m, const int8_t* ahead, float (*total)[PADDED_M]) {
    int64_t columns = block_columns(j, block);
    (void)step, (void)ahead;
    for (int plane = 0; plane < j->planes; plane++) {
        const panel_t* x = (const panel_t*)j->limbs + (plane * j->padded_M + m) * j->padded_K + block * j->block;
        const float* scale = j->limb_scale + (block * j->planes + plane) * j->padded_M + m;
        sums sum[TILE_N][TILE_M];
        for (int n = 0; n < TILE_N; n++)
            for (int i = 0; i < TILE_M; i++) sum[n][i] = no_sums();
        for (int64_t k = 0; k < columns; k += LANES) {
            limbs w[TILE_N];
            for (int n = 0; n < TILE_N; n++) {
                w[n] = load_limbs(panel + n * stride + k);
                KEEP_IN_REGISTER(w[n]);
            }
            for (int i = 0; i < TILE_M; i++) {
                limbs row = load_limbs(x + i * j->padded_K + k);
                KEEP_IN_REGISTER(row);
                for (int n = 0; n < TILE_N; n++) {
                    sum[n][i] = add_products(sum[n][i], w[n], row);
                    KEEP_IN_REGISTER(sum[n][i]);
                }
            }
        }
        for (int n = 0; n < TILE_N; n++)
            for (int i = 0; i < TILE_M; i++) total[n][i] += scale[i] * reduce_add_sums(sum[n][i]);
    }
}

static void plain_multiply_chunk(const struct job* j, int64_t n0, int64_t height, int64_t end, int64_t chunk,
                                 float (*sums)[TILE_N][PADDED_M], void* panel) {
    (void)end;
    multiply_by_panels(j, n0, height, chunk, sums, panel, plain_fill_panel, plain_multiply_tile);
}

static int tiles_allowed(void) { return 1; }
static void start_tiles(void) {}
static void stop_tiles(void) {}
