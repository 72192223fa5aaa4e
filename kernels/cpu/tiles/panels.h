/* What engines of several rows share: unpacking weight rows, and the loop over panels.

   A panel holds one block of tile_n weight rows; each tile of TILE_M rows of x meets it, in groups of GROUP rows whose
   limbs of a block stay in the cache. An engine defines TILE_N, TILE_M, CHUNK, GROUP, STORED_M, PANEL_STRIDE,
   LIMB_SIZE and panel_t, then includes this file, and has these functions, called through ENGINE:
     plan            sets tile_n, width, block and padded_M of a job
     split_rows      16 rows of x, one block, to limbs
     multiply_chunk  sums of a chunk of output features: [chunk / tile_n][padded_M / 16][TILE_N][16] floats
   Once for all engines compiled in: tiles_allowed, start_tiles, stop_tiles (a thread's state of the matrix unit). */
#pragma once

typedef void fill_function(const struct job*, int64_t, int64_t, int64_t, panel_t*);
typedef void multiply_function(const struct job*, const panel_t*, int64_t, int64_t, int64_t, int64_t, const int8_t*,
                               float (*)[PADDED_M]);

struct plan {
    int64_t chunk;     /* output features that a thread takes at once */
    size_t panel_size; /* bytes of its panel */
};

_Static_assert(PADDED_M % TILE_M == 0 && CHUNK % TILE_N == 0, "tiles divide padded rows and chunks");
_Static_assert(FEW_CHUNK % FLOATS == 0 && CHUNK % FEW_CHUNK == 0, "results are written in whole vectors");

/* Weight row n, columns `first` to `first + columns`, as integers, then zeros up to `padded`; only zeros unless
 * `exists`. */
static inline __attribute__((always_inline)) void unpack_row(const struct job* j, int64_t n, int exists, int64_t first,
                                                             int64_t columns, int64_t padded, panel_t* to) {
    int64_t bytes = j->K * j->bits / 8, k = 0;
    if (exists) {
        const int8_t* row = j->weight + n * bytes;
        if (j->bits == 8) {
            for (; k < columns; k++) to[k] = row[first + k];
        } else {
            int64_t high = min_i64(columns, bytes - first); /* columns in high nibbles */
            for (; k < high; k++) to[k] = high_nibble(row[first + k]);
            for (; k < columns; k++) to[k] = low_nibble(row[first + k - bytes]);
        }
    }
    for (; k < padded; k++) to[k] = 0;
}

/* multiply_chunk of engines that fill one panel at a time. */
static inline __attribute__((always_inline)) void multiply_by_panels(const struct job* j, int64_t n0, int64_t height,
                                                                     int64_t chunk, float (*sums)[TILE_N][PADDED_M],
                                                                     panel_t* panel, fill_function* fill,
                                                                     multiply_function* multiply) {
    const int64_t m_tiles = j->padded_M / PADDED_M, tile_n = j->tile_n;
    for (int64_t block = 0; block * j->block < j->padded_K; block++)
        for (int64_t group = 0; group < j->M; group += GROUP)
            for (int64_t n = n0; n < n0 + height; n += tile_n) {
                int64_t rows = min_i64(tile_n, n0 + height - n), stride = BLOCK, step = 64;
                int64_t last = min_i64(group + GROUP, j->M);
                const panel_t* weights = panel;
                /* Stored weights of the next chunk are prefetched in the order of memory, not in many streams. */
                const int8_t* ahead =
                    j->weight + (n0 + chunk) * j->K + block * j->block * chunk + (n - n0) * block_columns(j, block);
                if (STORED_M && j->M <= STORED_M && j->bits == 8 && rows == tile_n && j->K == j->padded_K) {
                    weights = (const panel_t*)j->weight + n * j->K + block * j->block;
                    stride = j->K;
                } else {
                    fill(j, n, rows, block, panel);
                    stride = PANEL_STRIDE;
                    step = 64 * tile_n;
                }
                for (int64_t m = group; m < last; m += TILE_M) {
                    float (*tile)[PADDED_M] = sums[(n - n0) / tile_n * m_tiles + m / PADDED_M];
                    multiply(j, weights, stride, step, block, m, ahead, (float (*)[PADDED_M]) & tile[0][m % PADDED_M]);
                }
            }
}
