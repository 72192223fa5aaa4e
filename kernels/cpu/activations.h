/* Activations: rows as floats, and rows as limbs, which quantised products take.

   Products of integers and their sums are exact. A row of x, one block of columns at a time, is split into a sum of
   limbs, x = scale[0]·limb[0] + scale[1]·limb[1] + …: small integers, each with a smaller scale than the one before. As
   many limbs are taken as leave about what rounding to x's dtype would leave. All limbs number p of a row are plane p.
 */
#pragma once

/* The sum of a vector of accumulators; each is exact, the sum of all is rounded to float32. */
static inline float reduce_add_sums(sums s) { return reduce_add(from_sums(s)); }

/* FLOATS numbers of any dtype from index i on. */
static inline floats load_any(const void* p, int dtype, int64_t i) {
    if (dtype == FLOAT) return load((const float*)p + i);
    return dtype == HALF ? load_half((const uint16_t*)p + i) : load_bfloat((const uint16_t*)p + i);
}

/* `count` numbers of x as floats. */
static void read_floats(const void* x, int dtype, int64_t count, float* out) {
    const uint16_t* bits = x;
    int64_t i = 0;
    if (dtype == FLOAT) {
        memcpy(out, x, (size_t)count * sizeof *out);
        return;
    }
    if (dtype == HALF)
        for (; i + FLOATS <= count; i += FLOATS) store(out + i, load_half(bits + i));
    else
        for (; i + FLOATS <= count; i += FLOATS) store(out + i, load_bfloat(bits + i));
    for (; i < count; i++) out[i] = element(x, dtype, i);
}

/* `count` floats to y from index `at` on. */
static void write_floats(const float* from, int64_t count, int dtype, void* y, int64_t at) {
    uint16_t* bits = (uint16_t*)y + at;
    int64_t i = 0;
    if (dtype == FLOAT) {
        memcpy((float*)y + at, from, (size_t)count * sizeof *from);
        return;
    }
    if (dtype == HALF) {
        for (; i + FLOATS <= count; i += FLOATS) store_half(bits + i, load(from + i));
        for (; i < count; i++) bits[i] = to_half(from[i]);
    } else
        for (; i < count; i++) bits[i] = to_bfloat(from[i]);
}

enum {
    PADDED_M = 16, /* M is padded to a multiple of this */
    LIMB_MAX = sizeof(limb_t) == 1 ? 127 : 32767,
};
_Static_assert(BLOCK % CACHE_LINE == 0 && CACHE_LINE % LANES == 0, "blocks are whole cache lines of whole vectors");
_Static_assert((int64_t)BLOCK / FLOATS * (UNSIGNED_WEIGHTS ? 255 : 128) * LIMB_MAX <= INT32_MAX,
               "an accumulator holds its share of a block");

/* One product of a layer, or of M_AT_ONCE rows of it. */

struct job {
    const void *x, *scale, *bias;
    const int8_t* weight;
    void* y;
    int x_dtype, scale_dtype, bias_dtype, bits;
    int planes;                 /* limbs of a number */
    int width;                  /* rows of x in a tile of PADDED_M sums: PADDED_M, or half of it, each with two sums */
    int pairs;                  /* whether the engine is pairs.h */
    int64_t tile_n;             /* weight rows of a tile */
    int64_t M, N, K, block;     /* block: columns of a block, BLOCK at most */
    int64_t padded_M, padded_K; /* padded_M: sums of a weight row */
    limb_t* row_limbs;          /* of one row: [planes][padded_K] */
    void* limbs;                /* of several rows: as the engine says */
    float* limb_scale;          /* [blocks][planes][padded_M] */
    int32_t* start;             /* initial sums: of byte tiles [blocks][byte_tiles][padded_M], of pairs
                                   [blocks][planes][padded_M], of one row [parts][nibbles][planes][FLOATS] */
};

/* Columns of a block, padding included. */
static inline int64_t block_columns(const struct job* j, int64_t block) {
    return min_i64(j->block, j->padded_K - block * j->block);
}

/* Limbs of a number: one of int16 holds 15 bits, one of int8 about 7.5. Float32 needs one more than the halves. */
static int limb_count(int x_dtype, size_t limb_size) { return (limb_size == 1 ? 2 : 1) + (x_dtype == FLOAT); }

/* `count` columns of row m of x from `first` on, all of one block, as floats. For int4 the even columns come first,
   then the odd ones, as the high and the low nibbles of bytes. */
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
        part = min_i64(count - done, half - from);
        read_floats(row + 2 * from * size_of(j->x_dtype), j->x_dtype, 2 * part, pairs);
        for (int64_t k = 0; k < part; k++) out[done + k] = pairs[2 * k + odd];
    }
}

/* One block of row m of x as limbs [plane][stride], at most limb_max[plane] each, padded with zeros to a multiple of
   CACHE_LINE, and their scales. A number that is not finite makes the whole block NaN. */
static void split_block(const struct job* j, int64_t m, int64_t block, const int* limb_max, int16_t* limbs,
                        int64_t stride) {
    int64_t padded = block_columns(j, block), count = min_i64(j->block, j->K - block * j->block);
    float rest[BLOCK];
    uint32_t largest = 0; /* as the bits of a float, which order like its size */
    read_columns(j, m, block * j->block, count, rest);
    for (int64_t k = 0; k < count; k++) {
        uint32_t size = bits_of_float(rest[k]) & 0x7fffffff;
        largest = size > largest ? size : largest;
    }
    int finite = largest < 0x7f800000;
    float lift = float_of_bits(largest) < 0x1p-40f ? 0x1p60f : 1; /* keeps the scales of tiny numbers normal */
    float scale = largest ? float_of_bits(largest) * lift / (float)limb_max[0] : 1;
    if (scale < 0x1p-60f) scale = 0x1p-60f; /* subnormal numbers are taken for the smallest normal ones */
    for (int64_t k = 0; k < count; k++) rest[k] *= lift;
    for (int plane = 0; plane < j->planes; plane++, limbs += stride) {
        float inverse = 1 / scale;
        memset(limbs, 0, (size_t)padded * sizeof *limbs);
        if (finite)
            for (int64_t k = 0; k < count; k++) {
                float limb = (rest[k] * inverse + 0x1.8p23f) - 0x1.8p23f; /* rounds to an integer */
                limbs[k] = (int16_t)limb;
                rest[k] -= limb * scale;
            }
        j->limb_scale[(block * j->planes + plane) * j->padded_M + m] = finite ? scale / lift : NAN;
        /* About half a unit is left, somewhat more where the division was rounded: the next limb reaches that. */
        if (plane + 1 < j->planes) scale /= (float)(2 * (limb_max[plane + 1] - limb_max[plane + 1] / 64));
    }
}

/* `count` limbs, as numbers of `size` bytes. */
static void narrow_limbs(const int16_t* limbs, int64_t count, size_t size, void* to) {
    if (size == 2)
        memcpy(to, limbs, (size_t)count * 2);
    else
        for (int64_t k = 0; k < count; k++) ((int8_t*)to)[k] = (int8_t)limbs[k];
}

/* Scales and biases (0 without a bias) of `height` output features from n on. */
static void read_scale_and_bias(const struct job* j, int64_t n, int64_t height, float* scale, float* bias) {
    read_floats((const char*)j->scale + n * size_of(j->scale_dtype), j->scale_dtype, height, scale);
    if (j->bias)
        read_floats((const char*)j->bias + n * size_of(j->bias_dtype), j->bias_dtype, height, bias);
    else
        memset(bias, 0, (size_t)height * sizeof *bias);
}
