/* Rotary positions, in place: x [rows, H, 3·D] has a query, a key and a value a head. D is at most MAX_HEAD.
   Threads: each has a contiguous range of rows. Alignment: none. */
#pragma once

void chatglm_rotary(void* x, const void* cosine, const void* sine, int dtype, int64_t rows, int64_t H, int64_t D,
                    int64_t parts, int threads) {
    threads = threads_for(threads, 8 * rows * H * D);
#pragma omp parallel num_threads(threads)
    {
        float c[MAX_HEAD], s[MAX_HEAD], from[MAX_HEAD], to[MAX_HEAD];
        int64_t half = D / parts / 2;
        for (int64_t row = part_begin(rows); row < part_end(rows); row++) {
            read_floats((const char*)cosine + row * D * size_of(dtype), dtype, D, c);
            read_floats((const char*)sine + row * D * size_of(dtype), dtype, D, s);
            for (int64_t i = 0; i < 2 * H; i++) { /* the query and the key of each head */
                int64_t at = (row * H + i / 2) * 3 * D + i % 2 * D;
                read_floats((const char*)x + at * size_of(dtype), dtype, D, from);
                for (int64_t part = 0; part < D; part += 2 * half)
                    for (int64_t d = part; d < part + half; d++) {
                        to[d] = from[d] * c[d] - from[d + half] * s[d];
                        to[d + half] = from[d + half] * c[d + half] + from[d] * s[d + half];
                    }
                write_floats(to, D, dtype, x, at);
            }
        }
    }
}
