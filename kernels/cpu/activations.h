#pragma once

/* ---- Rows of activations ---- */

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

/* Whether this is a processor whose additions don't take turns with products, and whose threads read memory fastest in
   one stream each: AMD's with AVX512. ON_AMD=0 or 1 has it otherwise, for tests. */
static int on_amd(void) {
#ifdef ON_AMD
    return ON_AMD;
#elif defined(__AVX512VNNI__)
    return __builtin_cpu_is("amd");
#else
    return 0;
#endif
}
