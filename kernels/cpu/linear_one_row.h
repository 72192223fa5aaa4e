/* One row of x times int8 or int4 weights: each weight is read from memory once.

   Weight rows are read ROWS side by side, or, on AMD, in one stream: STRIPS rows in turn, a strip at a time, so that
   the limbs of a strip stay in the nearest cache. Limbs lie as [plane][padded_K], for int4 the even columns first.
   Threads: each has a contiguous range of output features. Alignment: none. */
#pragma once

_Static_assert(STRIP % BLOCK == 0, "a strip is whole blocks");

/* Bytes of a weight row from `first` on whose columns are in one block; for int4 in one block of each nibble. */
static int64_t part_bytes(const struct job* j, int64_t first) {
    int64_t bytes = j->K * j->bits / 8, part = min_i64(j->block - first % j->block, bytes - first);
    return j->bits == 8 ? part : min_i64(part, j->block - (first + bytes) % j->block);
}

/* Initial sums: minus what the 128 or 8 added to unsigned weights adds. */
static void set_start(const struct job* j) {
    if (!UNSIGNED_WEIGHTS) return;
    int32_t* start = j->start;
    int64_t bytes = j->K * j->bits / 8;
    for (int64_t first = 0, part; first < bytes; first += part) {
        part = part_bytes(j, first);
        for (int64_t x = first; x < j->K; x += bytes) /* nibbles of bytes */
            for (int plane = 0; plane < j->planes; plane++, start += FLOATS) {
                sums s = no_sums();
                for (int64_t k = 0; k < part; k += CACHE_LINE) /* as far as add_part reads */
                    for (int64_t i = k; i < k + CACHE_LINE; i += LANES)
                        s = subtract_multiple(s, load_limbs(j->row_limbs + plane * j->padded_K + x + i),
                                              j->bits == 8 ? 128 : 8);
                store_sums(start, s);
            }
    }
}

static inline sums start_sums(const int32_t* start) { return UNSIGNED_WEIGHTS ? load_sums(start) : no_sums(); }

/* s[r] += bytes of `count` weight rows, which lie `stride` bytes apart, times CACHE_LINE limbs from x on; of int4, high
   nibbles times these and low nibbles times those from x + low on. */
static inline __attribute__((always_inline)) void add_line(const int8_t* w, int64_t stride, const int count,
                                                           const int nibbles, const limb_t* x, int64_t low,
                                                           int64_t x_stride, const int planes, sums (*s)[2][3]) {
    for (int i = 0; i < CACHE_LINE; i += LANES) {
        limbs of_x[2][3];
        for (int nibble = 0; nibble < nibbles; nibble++)
            for (int plane = 0; plane < planes; plane++)
                of_x[nibble][plane] = load_limbs(x + nibble * low + plane * x_stride + i);
        for (int r = 0; r < count; r++) {
            limbs bytes = load_int8(w + r * stride + i);
            for (int nibble = 0; nibble < nibbles; nibble++) {
                limbs of_w = nibbles == 1 ? bytes : nibble == 0 ? high_nibbles(bytes) : low_nibbles(bytes);
                for (int plane = 0; plane < planes; plane++)
                    s[r][nibble][plane] = add_products(s[r][nibble][plane], of_w, of_x[nibble][plane]);
            }
        }
    }
}

/* sum[r] += weights · limbs of `part` bytes from `first` on, as part_bytes says, of `count` weight rows. Their bytes
   begin at w. `ahead`: what to prefetch beside one row; with `strips` it stays in all caches. */
static inline __attribute__((always_inline)) void add_part(const struct job* j, const int8_t* w, const int count,
                                                           const int nibbles, const int planes, int64_t first,
                                                           int64_t part, const int32_t* start, const int8_t* ahead,
                                                           const int strips, floats* sum) {
    const int64_t bytes = nibbles == 1 ? j->K : j->K / 2;
    const limb_t* x = j->row_limbs + first;
    int64_t k = 0;
    sums s[ROWS][2][3];
    for (int r = 0; r < count; r++)
        for (int nibble = 0; nibble < nibbles; nibble++)
            for (int plane = 0; plane < planes; plane++)
                s[r][nibble][plane] = start_sums(start + (nibble * planes + plane) * FLOATS);
    for (; k + CACHE_LINE <= part; k += CACHE_LINE) {
        int64_t near = first + k + NEAR < bytes ? NEAR : NEAR + (count - 1) * bytes; /* the next rows' beginnings */
        if (strips)
            __builtin_prefetch(ahead + k);
        else if (count == 1)
            __builtin_prefetch(ahead + k, 0, 0);
        else
            for (int r = 0; r < count; r++) __builtin_prefetch(w + k + r * bytes + near);
        add_line(w + k, bytes, count, nibbles, x + k, bytes, j->padded_K, planes, s);
    }
    if (k < part) {
        int8_t rest[ROWS][CACHE_LINE];
        memset(rest, 0, sizeof rest);
        for (int r = 0; r < count; r++) memcpy(rest[r], w + r * bytes + k, (size_t)(part - k));
        add_line(rest[0], CACHE_LINE, count, nibbles, x + k, bytes, j->padded_K, planes, s);
    }
    for (int nibble = 0; nibble < nibbles; nibble++) {
        const float* scale = j->limb_scale + (first + nibble * bytes) / j->block * planes;
        for (int plane = 0; plane < planes; plane++)
            for (int r = 0; r < count; r++)
                sum[r] = multiply_add(from_sums(s[r][nibble][plane]), broadcast(scale[plane]), sum[r]);
    }
}

/* line[r] = weight row n + r · x, for `count` weight rows side by side. */
static inline __attribute__((always_inline)) void dot_rows(const struct job* j, int64_t n, const int count,
                                                           const int nibbles, const int planes, float* line) {
    const int64_t bytes = nibbles == 1 ? j->K : j->K / 2;
    const int8_t* w = j->weight + n * bytes;
    const int32_t* start = j->start;
    floats sum[ROWS];
    for (int r = 0; r < count; r++) sum[r] = zeros();
    for (int64_t k = 0, part; k < bytes; k += part, start += nibbles * planes * FLOATS) {
        part = part_bytes(j, k);
        add_part(j, w + k, count, nibbles, planes, k, part, start, w + k + FAR, 0, sum);
    }
    for (int r = 0; r < count; r++) line[r] = reduce_add(sum[r]);
}

/* The same for STRIPS rows one after the other, in strips: the limbs of a long row would leave the nearest cache. What
   is fetched meanwhile are the next rows, as they lie in memory. */
static inline __attribute__((always_inline)) void dot_strips(const struct job* j, int64_t n, const int nibbles,
                                                             const int planes, float* line) {
    const int64_t bytes = nibbles == 1 ? j->K : j->K / 2;
    const int8_t *w = j->weight + n * bytes, *ahead = w + STRIPS * bytes;
    const int32_t *start = j->start, *next = start;
    floats sum[STRIPS];
    for (int r = 0; r < STRIPS; r++) sum[r] = zeros();
    for (int64_t strip = 0; strip < bytes; strip += STRIP, start = next)
        for (int r = 0; r < STRIPS; r++) {
            next = start;
            for (int64_t k = strip, part; k < min_i64(strip + STRIP, bytes); k += part, ahead += part) {
                part = part_bytes(j, k); /* ends with a strip, which is some blocks long */
                add_part(j, w + r * bytes + k, 1, nibbles, planes, k, part, next, ahead, 1, sum + r);
                next += nibbles * planes * FLOATS;
            }
        }
    for (int r = 0; r < STRIPS; r++) line[r] = reduce_add(sum[r]);
}

enum way { BY_ROW, BY_ROWS, BY_STRIPS };

/* The same for as many rows as `way` takes. */
static inline __attribute__((always_inline)) void dot_by(const struct job* j, int64_t n, enum way way,
                                                         const int nibbles, const int planes, float* line) {
    if (way == BY_ROW)
        dot_rows(j, n, 1, nibbles, planes, line);
    else if (way == BY_ROWS)
        dot_rows(j, n, ROWS, nibbles, planes, line);
    else
        dot_strips(j, n, nibbles, planes, line);
}

/* y[begin:end] for one row. */
static void multiply_row(const struct job* j, int64_t begin, int64_t end) {
    enum { OF_HALF = sizeof(limb_t) == 1 ? 2 : 1, OF_FLOAT = OF_HALF + 1 };
    const int rows_of[] = {[BY_ROW] = 1, [BY_ROWS] = ROWS, [BY_STRIPS] = STRIPS};
    const enum way many = !on_amd() ? BY_ROWS : j->K * j->bits / 8 > STRIP ? BY_STRIPS : BY_ROW;
    float scale[CHUNK], bias[CHUNK], line[CHUNK];
    for (int64_t n0 = begin; n0 < end; n0 += CHUNK) {
        int64_t height = min_i64(CHUNK, end - n0);
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
        read_scale_and_bias(j, n0, height, scale, bias);
        for (int64_t n = 0; n < height; n++) line[n] = line[n] * scale[n] + bias[n];
        write_floats(line, height, j->x_dtype, j->y, n0);
    }
}

/* The row as limbs, and initial sums. */
static void split_row(const struct job* j, int blocks) {
    for (int block = 0; block < blocks; block++) {
        int16_t split[3][BLOCK];
        split_block(j, 0, block, (int[]){LIMB_MAX, LIMB_MAX, LIMB_MAX}, split[0], BLOCK);
        limb_t* to = j->row_limbs + block * BLOCK;
        for (int plane = 0; plane < j->planes; plane++, to += j->padded_K)
            narrow_limbs(split[plane], block_columns(j, block), sizeof(limb_t), to);
    }
    set_start(j);
}
