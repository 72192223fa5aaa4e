/* What every kernel uses: dtypes, float16 and bfloat16 one at a time, and how threads share work.

   Threads: an OpenMP team. thread_number() and thread_count() hold inside a parallel region; part_begin(count) and
   part_end(count) bound this thread's contiguous share. Without OpenMP there is one thread. */
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _WIN32
#include <malloc.h>
#endif

enum { FLOAT, HALF, BFLOAT }; /* dtypes, as the caller numbers them */
enum { OK, NO_MEMORY };
enum {
    CACHE_LINE = 64, /* bytes of weights that are taken at a time */
    NEAR = 1024,     /* bytes ahead that weights are prefetched, of ROWS rows side by side */
    FAR = 4096,      /* the same in one stream */
    STRIP = 4096,    /* bytes of a row that are taken at a time in one stream */
    STRIPS = 12,     /* rows whose strips are taken one after the other */
    ROWS = 4,        /* weight rows that are read side by side */
    MAX_HEAD = 256,  /* numbers of a head, at most */
};

static inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
static inline int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }

/* `size` bytes, aligned to a cache line, or NULL; `release` frees them. */
#ifdef _WIN32
static inline void* allocate(int64_t size) { /* it gives NULL for 0 bytes */
    return _aligned_malloc((size_t)size + 1, CACHE_LINE);
}
static inline void release(void* memory) { _aligned_free(memory); }
#else
static inline void* allocate(int64_t size) { return aligned_alloc(CACHE_LINE, (size_t)round_up(size, CACHE_LINE)); }
static inline void release(void* memory) { free(memory); }
#endif

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
static inline int8_t high_nibble(int8_t byte) { return (int8_t)(byte >> 4); }
static inline int8_t low_nibble(int8_t byte) { return (int8_t)((int8_t)((uint8_t)byte << 4) >> 4); }

static inline int64_t size_of(int dtype) { return dtype == FLOAT ? 4 : 2; }

static inline float element(const void* p, int dtype, int64_t i) {
    if (dtype == FLOAT) return ((const float*)p)[i];
    uint16_t bits = ((const uint16_t*)p)[i];
    return dtype == HALF ? from_half(bits) : from_bfloat(bits);
}

/* True on AMD with AVX512: additions and products issue on ports of their own, and a thread reads memory fastest in one
   stream. Tests force it by -DON_AMD=0 or 1. */
static int on_amd(void) {
#ifdef ON_AMD
    return ON_AMD;
#elif defined(__AVX512VNNI__)
    return __builtin_cpu_is("amd");
#else
    return 0;
#endif
}

#ifdef _OPENMP
int omp_get_thread_num(void); /* not every compiler with OpenMP has omp.h */
int omp_get_num_threads(void);
#ifdef OPENMP_OVER_GOMP
#include "openmp_gomp.h"
#endif
static int64_t thread_number(void) { return omp_get_thread_num(); }
static int64_t thread_count(void) { return omp_get_num_threads(); }
#else
static int64_t thread_number(void) { return 0; }
static int64_t thread_count(void) { return 1; }
#endif

/* Threads that pay off, `threads` at most: waking one takes as long as some 100,000 products. */
static int threads_for(int threads, int64_t products) { return (int)min_i64(threads, 1 + products / (1 << 18)); }

/* This thread's share of `count` items: from part_begin on, before part_end. */
static int64_t part_begin(int64_t count) { return count * thread_number() / thread_count(); }
static int64_t part_end(int64_t count) { return count * (thread_number() + 1) / thread_count(); }
