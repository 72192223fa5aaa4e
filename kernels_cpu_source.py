"""C source of the CPU kernels, which `kernels_cpu` compiles for the machine that runs it.

Here are the instruction sets and what else all kernels use; the kernels are in `kernels_cpu_linear`, the quantised
linear, and `kernels_cpu_layers`, the rest.
"""

from .kernels_cpu_layers import LAYERS
from .kernels_cpu_linear import LINEAR

BASICS = r"""
/* The CPU kernels, compiled for the machine that runs them. First what all of them use.

   Letters: M rows of an activation, K columns, N output features; B sequences, H heads, S queries, T keys, D numbers a
   head.
*/
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

enum { FLOAT, HALF, BFLOAT };             /* dtypes, as the caller numbers them */
enum { OK, NO_MEMORY };
enum {
    LINE = 64,                            /* bytes of weights that are taken at a time: a cache line */
    NEAR = 1024,                          /* bytes ahead that weights are prefetched, of rows side by side */
    FAR = 4096,                           /* the same in one stream */
    STRIP = 4096,                         /* bytes of a row that are taken at a time in one stream */
    STRIPS = 12,                          /* rows whose strips are taken one after the other */
    ROWS = 4,                             /* weight rows that are read side by side */
};

static inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- Half numbers, one at a time ---- */

static inline float float_of_bits(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
static inline uint32_t bits_of_float(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }

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

static inline float element(const void *p, int dtype, int64_t i) {
    if (dtype == FLOAT) return ((const float *)p)[i];
    uint16_t bits = ((const uint16_t *)p)[i];
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

/* ---- Instruction sets: the same few operations for each ----
   floats: FLOATS fp32 numbers. digits: LANES digits of type digit_t, DIGIT_MAX at most. sums: int32 partial sums.
   A matrix unit stands beside AVX512 and has names of its own: its digits are of type panel_t. */

#if (defined(__AMX_INT8__) && defined(__linux__)) || defined(EMULATE_AMX)
#define AMX
#define INSTRUCTIONS "AMX"
enum { TILE_N = 32, TILE_M = 16, TILE_K = 64, BLOCK = 1024, PANEL_DIGIT_MAX = 127 };
typedef int8_t panel_t;
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include <immintrin.h>
enum { FLOATS = 16 };
typedef __m512 floats;
static inline floats zeros(void) { return _mm512_setzero_ps(); }
static inline floats all(float f) { return _mm512_set1_ps(f); }
static inline floats load(const float *p) { return _mm512_loadu_ps(p); }
static inline void store(float *p, floats v) { _mm512_storeu_ps(p, v); }
static inline floats add(floats a, floats b) { return _mm512_add_ps(a, b); }
static inline floats multiply_add(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
static inline float total(floats v) { return _mm512_reduce_add_ps(v); }
static inline floats load_half(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
static inline void store_half(uint16_t *p, floats v) { _mm256_storeu_si256((void *)p, _mm512_cvtps_ph(v, 0)); }
static inline floats load_bfloat(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16));
}
typedef __m512i digits;
typedef int32_t sums __attribute__((vector_size(64))); /* not __m512i, which gcc 12 copies to and fro */
static inline sums no_sums(void) { return (sums)_mm512_setzero_si512(); }
static inline sums load_sums(const int32_t *p) { return (sums)_mm512_loadu_si512(p); }
static inline void store_sums(int32_t *p, sums s) { _mm512_storeu_si512(p, (__m512i)s); }
#ifdef __AVX512VNNI__ /* four products of unsigned and signed bytes at a time: weights become unsigned */
#define UNSIGNED_WEIGHTS
enum { LANES = 64 };
typedef int8_t digit_t;
static inline digits load_digits(const digit_t *p) { return _mm512_loadu_si512(p); }
static inline digits flip_signs(digits bytes) { return _mm512_xor_si512(bytes, _mm512_set1_epi8(-128)); }
static inline digits load_int8(const int8_t *p) { return flip_signs(_mm512_loadu_si512(p)); }
static inline digits high_halves(digits bytes) {
    return _mm512_and_si512(_mm512_srli_epi16(bytes, 4), _mm512_set1_epi8(15));
}
static inline digits low_halves(digits bytes) {
    return _mm512_xor_si512(_mm512_and_si512(bytes, _mm512_set1_epi8(15)), _mm512_set1_epi8(8));
}
static inline digits repeat4(const void *p) { int32_t four; memcpy(&four, p, 4); return _mm512_set1_epi32(four); }
static inline digits repeat8(const void *p) { int64_t eight; memcpy(&eight, p, 8); return _mm512_set1_epi64(eight); }
static inline sums add_products(sums s, digits weights, digits x) {
    return (sums)_mm512_dpbusd_epi32((__m512i)s, weights, x);
}
static inline sums take_multiple(sums s, digits x, uint8_t times) { /* s - times · x */
    return s - add_products(no_sums(), _mm512_set1_epi8((char)times), x);
}
static inline sums join_sums(sums high, sums low) { /* 256 · high + low; may wrap around on the way */
    return (sums)_mm512_add_epi32(_mm512_slli_epi32((__m512i)high, 8), (__m512i)low);
}
static inline sums add_neighbours(sums s) { /* in both places of a pair */
    return s + (sums)_mm512_shuffle_epi32((__m512i)s, _MM_PERM_CDAB);
}
enum { BYTE_N = 8 };
#define FOR_BYTE_N(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7)
#ifndef AMX
#define INSTRUCTIONS "AVX512 with VNNI"
#endif
#else
enum { LANES = 32 };
typedef int16_t digit_t;
static inline digits load_digits(const digit_t *p) { return _mm512_loadu_si512(p); }
static inline digits load_int8(const int8_t *p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const void *)p)); }
static inline digits high_halves(digits bytes) { return _mm512_srai_epi16(bytes, 4); }
static inline digits low_halves(digits bytes) { return _mm512_srai_epi16(_mm512_slli_epi16(bytes, 12), 12); }
static inline sums add_products(sums s, digits a, digits b) { return s + (sums)_mm512_madd_epi16(a, b); }
#ifndef AMX
#define INSTRUCTIONS "AVX512"
enum { TILE_N = 4, TILE_M = 4, BLOCK = 1024 };
#endif
#endif
static inline floats from_sums(sums s) { return _mm512_cvtepi32_ps((__m512i)s); }
static inline floats load_int32(const int32_t *p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
enum { FLOATS = 8 };
typedef __m256 floats;
static inline floats zeros(void) { return _mm256_setzero_ps(); }
static inline floats all(float f) { return _mm256_set1_ps(f); }
static inline floats load(const float *p) { return _mm256_loadu_ps(p); }
static inline void store(float *p, floats v) { _mm256_storeu_ps(p, v); }
static inline floats add(floats a, floats b) { return _mm256_add_ps(a, b); }
static inline floats multiply_add(floats a, floats b, floats c) { return _mm256_fmadd_ps(a, b, c); }
static inline float total(floats v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
static inline floats load_half(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const void *)p)); }
static inline void store_half(uint16_t *p, floats v) { _mm_storeu_si128((void *)p, _mm256_cvtps_ph(v, 0)); }
static inline floats load_bfloat(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)), 16));
}
typedef __m256i digits;
typedef int32_t sums __attribute__((vector_size(32)));
static inline sums no_sums(void) { return (sums)_mm256_setzero_si256(); }
#ifdef __AVXVNNI__ /* as of AVX512 */
#define UNSIGNED_WEIGHTS
enum { LANES = 32 };
typedef int8_t digit_t;
static inline sums load_sums(const int32_t *p) { return (sums)_mm256_loadu_si256((const void *)p); }
static inline void store_sums(int32_t *p, sums s) { _mm256_storeu_si256((void *)p, (__m256i)s); }
static inline digits load_digits(const digit_t *p) { return _mm256_loadu_si256((const void *)p); }
static inline digits flip_signs(digits bytes) { return _mm256_xor_si256(bytes, _mm256_set1_epi8(-128)); }
static inline digits load_int8(const int8_t *p) { return flip_signs(load_digits(p)); }
static inline digits high_halves(digits bytes) {
    return _mm256_and_si256(_mm256_srli_epi16(bytes, 4), _mm256_set1_epi8(15));
}
static inline digits low_halves(digits bytes) {
    return _mm256_xor_si256(_mm256_and_si256(bytes, _mm256_set1_epi8(15)), _mm256_set1_epi8(8));
}
static inline digits repeat4(const void *p) { int32_t four; memcpy(&four, p, 4); return _mm256_set1_epi32(four); }
static inline digits repeat8(const void *p) { int64_t eight; memcpy(&eight, p, 8); return _mm256_set1_epi64x(eight); }
static inline sums add_products(sums s, digits weights, digits x) {
    return (sums)_mm256_dpbusd_avx_epi32((__m256i)s, weights, x);
}
static inline sums take_multiple(sums s, digits x, uint8_t times) {
    return s - add_products(no_sums(), _mm256_set1_epi8((char)times), x);
}
static inline sums join_sums(sums high, sums low) {
    return (sums)_mm256_add_epi32(_mm256_slli_epi32((__m256i)high, 8), (__m256i)low);
}
static inline sums add_neighbours(sums s) { return s + (sums)_mm256_shuffle_epi32((__m256i)s, 0xb1); }
enum { BYTE_N = 4 };
#define FOR_BYTE_N(DO) DO(0) DO(1) DO(2) DO(3)
#ifndef AMX
#define INSTRUCTIONS "AVX2 with VNNI"
#endif
#else
enum { LANES = 16 };
typedef int16_t digit_t;
static inline digits load_digits(const digit_t *p) { return _mm256_loadu_si256((const void *)p); }
static inline digits load_int8(const int8_t *p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)p)); }
static inline digits high_halves(digits bytes) { return _mm256_srai_epi16(bytes, 4); }
static inline digits low_halves(digits bytes) { return _mm256_srai_epi16(_mm256_slli_epi16(bytes, 12), 12); }
static inline sums add_products(sums s, digits a, digits b) { return s + (sums)_mm256_madd_epi16(a, b); }
#ifndef AMX
#define INSTRUCTIONS "AVX2"
enum { TILE_N = 4, TILE_M = 2, BLOCK = 2048 };
#endif
#endif
static inline floats from_sums(sums s) { return _mm256_cvtepi32_ps((__m256i)s); }
static inline floats load_int32(const int32_t *p) { return _mm256_cvtepi32_ps(_mm256_loadu_si256((const void *)p)); }

#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
enum { FLOATS = 4, TILE_N = 4, TILE_M = 4, BLOCK = 1024 };
typedef float32x4_t floats;
typedef int32x4_t sums;
static inline floats zeros(void) { return vdupq_n_f32(0); }
static inline floats all(float f) { return vdupq_n_f32(f); }
static inline floats load(const float *p) { return vld1q_f32(p); }
static inline void store(float *p, floats v) { vst1q_f32(p, v); }
static inline floats add(floats a, floats b) { return vaddq_f32(a, b); }
static inline floats multiply_add(floats a, floats b, floats c) { return vfmaq_f32(c, a, b); }
static inline float total(floats v) { return vaddvq_f32(v); }
static inline floats load_half(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
static inline void store_half(uint16_t *p, floats v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
static inline floats load_bfloat(const uint16_t *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
static inline sums no_sums(void) { return vdupq_n_s32(0); }
#ifdef __ARM_FEATURE_DOTPROD
#define INSTRUCTIONS "NEON with dot product"
enum { LANES = 16 };
typedef int8_t digit_t;
typedef int8x16_t digits;
static inline digits load_digits(const digit_t *p) { return vld1q_s8(p); }
static inline digits load_int8(const int8_t *p) { return vld1q_s8(p); }
static inline digits high_halves(digits bytes) { return vshrq_n_s8(bytes, 4); }
static inline digits low_halves(digits bytes) { return vshrq_n_s8(vshlq_n_s8(bytes, 4), 4); }
static inline sums add_products(sums s, digits a, digits b) { return vdotq_s32(s, a, b); }
#else
#define INSTRUCTIONS "NEON"
enum { LANES = 8 };
typedef int16_t digit_t;
typedef int16x8_t digits;
static inline digits load_digits(const digit_t *p) { return vld1q_s16(p); }
static inline digits load_int8(const int8_t *p) { return vmovl_s8(vld1_s8(p)); }
static inline digits high_halves(digits bytes) { return vshrq_n_s16(bytes, 4); }
static inline digits low_halves(digits bytes) { return vshrq_n_s16(vshlq_n_s16(bytes, 12), 12); }
static inline sums add_products(sums s, digits a, digits b) {
    return vmlal_high_s16(vmlal_s16(s, vget_low_s16(a), vget_low_s16(b)), a, b);
}
#endif
static inline floats from_sums(sums s) { return vcvtq_f32_s32(s); }
static inline floats load_int32(const int32_t *p) { return vcvtq_f32_s32(vld1q_s32(p)); }

#else
#define INSTRUCTIONS "portable C"
enum { FLOATS = 8, LANES = 8, TILE_N = 2, TILE_M = 2, BLOCK = 2048 };
typedef struct { float of[FLOATS]; } floats;
typedef struct { int16_t of[LANES]; } digits;
typedef struct { int32_t of[LANES]; } sums;
typedef int16_t digit_t;
#define EACH(count) for (int i = 0; i < (count); i++)
static inline floats zeros(void) { floats v; EACH(FLOATS) v.of[i] = 0; return v; }
static inline floats all(float f) { floats v; EACH(FLOATS) v.of[i] = f; return v; }
static inline floats load(const float *p) { floats v; EACH(FLOATS) v.of[i] = p[i]; return v; }
static inline void store(float *p, floats v) { EACH(FLOATS) p[i] = v.of[i]; }
static inline floats add(floats a, floats b) { EACH(FLOATS) a.of[i] += b.of[i]; return a; }
static inline floats multiply_add(floats a, floats b, floats c) { EACH(FLOATS) c.of[i] += a.of[i] * b.of[i]; return c; }
static inline float total(floats v) { float sum = 0; EACH(FLOATS) sum += v.of[i]; return sum; }
static inline floats load_half(const uint16_t *p) { floats v; EACH(FLOATS) v.of[i] = from_half(p[i]); return v; }
static inline void store_half(uint16_t *p, floats v) { EACH(FLOATS) p[i] = to_half(v.of[i]); }
static inline floats load_bfloat(const uint16_t *p) { floats v; EACH(FLOATS) v.of[i] = from_bfloat(p[i]); return v; }
static inline digits load_digits(const digit_t *p) { digits v; EACH(LANES) v.of[i] = p[i]; return v; }
static inline digits load_int8(const int8_t *p) { digits v; EACH(LANES) v.of[i] = p[i]; return v; }
static inline digits high_halves(digits v) { EACH(LANES) v.of[i] = high_half((int8_t)v.of[i]); return v; }
static inline digits low_halves(digits v) { EACH(LANES) v.of[i] = low_half((int8_t)v.of[i]); return v; }
static inline sums no_sums(void) { sums s; EACH(LANES) s.of[i] = 0; return s; }
static inline sums add_products(sums s, digits a, digits b) { EACH(LANES) s.of[i] += a.of[i] * b.of[i]; return s; }
static inline floats from_sums(sums s) { floats v; EACH(LANES) v.of[i] = (float)s.of[i]; return v; }
static inline floats load_int32(const int32_t *p) { floats v; EACH(FLOATS) v.of[i] = (float)p[i]; return v; }
#endif
static inline float total_sums(sums s) { return total(from_sums(s)); }
#if defined(UNSIGNED_WEIGHTS) && !defined(AMX)
#define BYTE_TILES
enum { TILE_N = BYTE_N, TILE_M = 16, BLOCK = 1024 };
#ifdef __AVX512F__
#define PAIRS
#endif
#endif
#ifndef AMX
enum { TILE_K = LINE, PANEL_DIGIT_MAX = sizeof(digit_t) == 1 ? 127 : 32767 };
typedef digit_t panel_t;
#endif

static inline floats load_any(const void *p, int dtype, int64_t i) {
    if (dtype == FLOAT) return load((const float *)p + i);
    return dtype == HALF ? load_half((const uint16_t *)p + i) : load_bfloat((const uint16_t *)p + i);
}

/* ---- Rows of activations ---- */

static void read_floats(const void *x, int dtype, int64_t count, float *out) {
    const uint16_t *bits = x;
    int64_t i = 0;
    if (dtype == FLOAT) { memcpy(out, x, (size_t)count * sizeof *out); return; }
    if (dtype == HALF)
        for (; i + FLOATS <= count; i += FLOATS) store(out + i, load_half(bits + i));
    else
        for (; i + FLOATS <= count; i += FLOATS) store(out + i, load_bfloat(bits + i));
    for (; i < count; i++) out[i] = element(x, dtype, i);
}

static void write_floats(const float *from, int64_t count, int dtype, void *y, int64_t at) {
    uint16_t *bits = (uint16_t *)y + at;
    int64_t i = 0;
    if (dtype == FLOAT) { memcpy((float *)y + at, from, (size_t)count * sizeof *from); return; }
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

/* ---- Threads ---- */

#ifdef _OPENMP
static int64_t thread_number(void) { return omp_get_thread_num(); }
static int64_t thread_count(void) { return omp_get_num_threads(); }
#else
static int64_t thread_number(void) { return 0; }
static int64_t thread_count(void) { return 1; }
#endif

/* As many threads as there is work for, `threads` at most: to call one takes as long as some 100,000 products. */
static int of_threads(int threads, int64_t products) { return (int)least(threads, 1 + products / (1 << 18)); }

/* Of `count` things, those that this thread does. */
static int64_t part_begin(int64_t count) { return count * thread_number() / thread_count(); }
static int64_t part_end(int64_t count) { return count * (thread_number() + 1) / thread_count(); }

/* Whether the instructions this was compiled for may be used: 0 if the system refuses the matrix unit. */
int chatglm_start(void) {
#if defined(AMX) && !defined(EMULATE_AMX)
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
#else
    return 1;
#endif
}

const char *chatglm_instructions(void) { return INSTRUCTIONS; }
"""

SOURCE = BASICS + LINEAR + LAYERS
