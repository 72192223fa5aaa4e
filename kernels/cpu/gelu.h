/* GELU in its tanh form, in place. Threads: each has a contiguous range of parts. Alignment: none. */
#pragma once

void chatglm_gelu(void* x, int dtype, int64_t count, int threads) {
    enum { PART = 1024 };
    threads = threads_for(threads, 16 * count);
#pragma omp parallel num_threads(threads)
    {
        int64_t parts = (count + PART - 1) / PART;
        for (int64_t i = part_begin(parts); i < part_end(parts); i++) {
            float line[PART];
            int64_t length = min_i64(PART, count - i * PART);
            read_floats((char*)x + i * PART * size_of(dtype), dtype, length, line);
            for (int64_t j = 0; j < length; j++) {
                float u = 1.5957691216f * (line[j] + 0.044715f * line[j] * line[j] * line[j]);
                line[j] = line[j] / (1 + fast_exp(-u));
            }
            write_floats(line, length, dtype, x, i * PART);
        }
    }
}
