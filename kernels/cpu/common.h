#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum { FLOAT, HALF, BFLOAT }; /* dtypes, as the caller numbers them */
enum { OK, NO_MEMORY };
enum {
    LINE = 64,    /* bytes of weights that are taken at a time: a cache line */
    NEAR = 1024,  /* bytes ahead that weights are prefetched, of rows side by side */
    FAR = 4096,   /* the same in one stream */
    STRIP = 4096, /* bytes of a row that are taken at a time in one stream */
    STRIPS = 12,  /* rows whose strips are taken one after the other */
    ROWS = 4,     /* weight rows that are read side by side */
};

static inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- Half numbers, one at a time ---- */

static inline float float_of_bits(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
static inline uint32_t bits_of_float(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}

static inline float from_half(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff;
    if (magnitude >= 0x7c00) return float_of_bits(sign | 0x7f800000 | magnitude << 13);
    return float_of_bits(sign | bits_of_float(float_of_bits(magnitude << 13) * 0x1p112f));
}

static inline uint16_t to_half(float f) { /* to the nearest, ties to even */
    uint32_t bits = bits_of_float(f), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x47800000) return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000) /* subnormal: adding 1/2 leaves units of 2^-24 */
        return (uint16_t)(sign | (bits_of_float(float_of_bits(magnitude) + 0.5f) - bits_of_float(0.5f)));
    return (uint16_t)(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

static inline float from_bfloat(uint16_t b) { return float_of_bits((uint32_t)b << 16); }

static inline uint16_t to_bfloat(float f) {
    uint32_t bits = bits_of_float(f);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* The two int4 numbers of a byte. */
static inline int8_t high_half(int8_t byte) { return (int8_t)(byte >> 4); }
static inline int8_t low_half(int8_t byte) { return (int8_t)((int8_t)((uint8_t)byte << 4) >> 4); }

static inline int64_t size_of(int dtype) { return dtype == FLOAT ? 4 : 2; }

static inline float element(const void* p, int dtype, int64_t i) {
    if (dtype == FLOAT) return ((const float*)p)[i];
    uint16_t bits = ((const uint16_t*)p)[i];
    return dtype == HALF ? from_half(bits) : from_bfloat(bits);
}

/* Keeps a vector in a register: gcc would rather load it again for each use. */
#if defined(__AVX2__)
#define KEEP(v) __asm__("" : "+v"(v))
#elif defined(__aarch64__)
#define KEEP(v) __asm__("" : "+w"(v))
#else
#define KEEP(v) (void)(v)
#endif
