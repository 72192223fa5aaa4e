#pragma once

/* x = gelu(x) in its tanh form, in place. */
void chatglm_gelu(void* x, int dtype, int64_t count, int threads) {
    enum { PART = 1024 };
    threads = of_threads(threads, 16 * count);
#pragma omp parallel num_threads(threads)
    {
        int64_t parts = (count + PART - 1) / PART;
        for (int64_t i = part_begin(parts); i < part_end(parts); i++) {
            float line[PART];
            int64_t length = least(PART, count - i * PART);
            read_floats((char*)x + i * PART * size_of(dtype), dtype, length, line);
            for (int64_t j = 0; j < length; j++) {
                float u = 1.5957691216f * (line[j] + 0.044715f * line[j] * line[j] * line[j]);
                line[j] = line[j] / (1 + quick_exp(-u));
            }
            write_floats(line, length, dtype, x, i * PART);
        }
    }
}
