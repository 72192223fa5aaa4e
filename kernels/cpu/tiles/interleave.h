/* Limbs of bytes in the order in which byte tiles and the matrix unit multiply them. */
#pragma once

/* Bytes of a row; no power of 2, or all rows would fall on the same place of the cache. */
enum { LINE_STRIDE = 2 * BLOCK + 64 };

/* PADDED_M lines of 64 bytes, in turn 4 bytes of each line; or half as many, and 8 bytes. */
static inline void interleave(const int8_t* lines, int64_t stride, int depth, int8_t* to) {
    if (depth == 4)
        for (int k = 0; k < 64; k += 4)
            for (int i = 0; i < PADDED_M; i++, to += 4) memcpy(to, lines + i * stride + k, 4);
    else
        for (int k = 0; k < 64; k += 8)
            for (int i = 0; i < PADDED_M / 2; i++, to += 8) memcpy(to, lines + i * stride + k, 8);
}

/* The limbs of a tile's rows, [tile][PADDED_M][LINE_STRIDE], as [column / 64][tile] parts that interleave writes. */
static inline void interleave_lines(const struct job* j, const int8_t* lines, int64_t columns, int tiles, int8_t* to) {
    for (int64_t k = 0; k < columns; k += 64)
        for (int tile = 0; tile < tiles; tile++, to += 64 * j->width)
            interleave(lines + tile * PADDED_M * LINE_STRIDE + k, LINE_STRIDE, 64 / j->width, to);
}
