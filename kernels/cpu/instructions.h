#pragma once

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
static inline floats load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, floats v) { _mm512_storeu_ps(p, v); }
static inline floats add(floats a, floats b) { return _mm512_add_ps(a, b); }
static inline floats multiply_add(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
static inline float total(floats v) { return _mm512_reduce_add_ps(v); }
static inline floats load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void*)p)); }
static inline void store_half(uint16_t* p, floats v) { _mm256_storeu_si256((void*)p, _mm512_cvtps_ph(v, 0)); }
static inline floats load_bfloat(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void*)p)), 16));
}
typedef __m512i digits;
typedef int32_t sums __attribute__((vector_size(64))); /* not __m512i, which gcc 12 copies to and fro */
static inline sums no_sums(void) { return (sums)_mm512_setzero_si512(); }
static inline sums load_sums(const int32_t* p) { return (sums)_mm512_loadu_si512(p); }
static inline void store_sums(int32_t* p, sums s) { _mm512_storeu_si512(p, (__m512i)s); }
#ifdef __AVX512VNNI__ /* four products of unsigned and signed bytes at a time: weights become unsigned */
#define UNSIGNED_WEIGHTS
enum { LANES = 64 };
typedef int8_t digit_t;
static inline digits load_digits(const digit_t* p) { return _mm512_loadu_si512(p); }
static inline digits flip_signs(digits bytes) { return _mm512_xor_si512(bytes, _mm512_set1_epi8(-128)); }
static inline digits load_int8(const int8_t* p) { return flip_signs(_mm512_loadu_si512(p)); }
static inline digits high_halves(digits bytes) {
    return _mm512_and_si512(_mm512_srli_epi16(bytes, 4), _mm512_set1_epi8(15));
}
static inline digits low_halves(digits bytes) {
    return _mm512_xor_si512(_mm512_and_si512(bytes, _mm512_set1_epi8(15)), _mm512_set1_epi8(8));
}
static inline digits repeat4(const void* p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
}
static inline digits repeat8(const void* p) {
    int64_t eight;
    memcpy(&eight, p, 8);
    return _mm512_set1_epi64(eight);
}
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
static inline digits load_digits(const digit_t* p) { return _mm512_loadu_si512(p); }
static inline digits load_int8(const int8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const void*)p)); }
static inline digits high_halves(digits bytes) { return _mm512_srai_epi16(bytes, 4); }
static inline digits low_halves(digits bytes) { return _mm512_srai_epi16(_mm512_slli_epi16(bytes, 12), 12); }
static inline sums add_products(sums s, digits a, digits b) { return s + (sums)_mm512_madd_epi16(a, b); }
#ifndef AMX
#define INSTRUCTIONS "AVX512"
enum { TILE_N = 4, TILE_M = 4, BLOCK = 1024 };
#endif
#endif
static inline floats from_sums(sums s) { return _mm512_cvtepi32_ps((__m512i)s); }
static inline floats load_int32(const int32_t* p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
enum { FLOATS = 8 };
typedef __m256 floats;
static inline floats zeros(void) { return _mm256_setzero_ps(); }
static inline floats all(float f) { return _mm256_set1_ps(f); }
static inline floats load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, floats v) { _mm256_storeu_ps(p, v); }
static inline floats add(floats a, floats b) { return _mm256_add_ps(a, b); }
static inline floats multiply_add(floats a, floats b, floats c) { return _mm256_fmadd_ps(a, b, c); }
static inline float total(floats v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
static inline floats load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const void*)p)); }
static inline void store_half(uint16_t* p, floats v) { _mm_storeu_si128((void*)p, _mm256_cvtps_ph(v, 0)); }
static inline floats load_bfloat(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void*)p)), 16));
}
typedef __m256i digits;
typedef int32_t sums __attribute__((vector_size(32)));
static inline sums no_sums(void) { return (sums)_mm256_setzero_si256(); }
#ifdef __AVXVNNI__ /* as of AVX512 */
#define UNSIGNED_WEIGHTS
enum { LANES = 32 };
typedef int8_t digit_t;
static inline sums load_sums(const int32_t* p) { return (sums)_mm256_loadu_si256((const void*)p); }
static inline void store_sums(int32_t* p, sums s) { _mm256_storeu_si256((void*)p, (__m256i)s); }
static inline digits load_digits(const digit_t* p) { return _mm256_loadu_si256((const void*)p); }
static inline digits flip_signs(digits bytes) { return _mm256_xor_si256(bytes, _mm256_set1_epi8(-128)); }
static inline digits load_int8(const int8_t* p) { return flip_signs(load_digits(p)); }
static inline digits high_halves(digits bytes) {
    return _mm256_and_si256(_mm256_srli_epi16(bytes, 4), _mm256_set1_epi8(15));
}
static inline digits low_halves(digits bytes) {
    return _mm256_xor_si256(_mm256_and_si256(bytes, _mm256_set1_epi8(15)), _mm256_set1_epi8(8));
}
static inline digits repeat4(const void* p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
}
static inline digits repeat8(const void* p) {
    int64_t eight;
    memcpy(&eight, p, 8);
    return _mm256_set1_epi64x(eight);
}
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
static inline digits load_digits(const digit_t* p) { return _mm256_loadu_si256((const void*)p); }
static inline digits load_int8(const int8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const void*)p)); }
static inline digits high_halves(digits bytes) { return _mm256_srai_epi16(bytes, 4); }
static inline digits low_halves(digits bytes) { return _mm256_srai_epi16(_mm256_slli_epi16(bytes, 12), 12); }
static inline sums add_products(sums s, digits a, digits b) { return s + (sums)_mm256_madd_epi16(a, b); }
#ifndef AMX
#define INSTRUCTIONS "AVX2"
enum { TILE_N = 4, TILE_M = 2, BLOCK = 2048 };
#endif
#endif
static inline floats from_sums(sums s) { return _mm256_cvtepi32_ps((__m256i)s); }
static inline floats load_int32(const int32_t* p) { return _mm256_cvtepi32_ps(_mm256_loadu_si256((const void*)p)); }

#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
enum { FLOATS = 4, TILE_N = 4, TILE_M = 4, BLOCK = 1024 };
typedef float32x4_t floats;
typedef int32x4_t sums;
static inline floats zeros(void) { return vdupq_n_f32(0); }
static inline floats all(float f) { return vdupq_n_f32(f); }
static inline floats load(const float* p) { return vld1q_f32(p); }
static inline void store(float* p, floats v) { vst1q_f32(p, v); }
static inline floats add(floats a, floats b) { return vaddq_f32(a, b); }
static inline floats multiply_add(floats a, floats b, floats c) { return vfmaq_f32(c, a, b); }
static inline float total(floats v) { return vaddvq_f32(v); }
static inline floats load_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
static inline void store_half(uint16_t* p, floats v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
static inline floats load_bfloat(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
static inline sums no_sums(void) { return vdupq_n_s32(0); }
#ifdef __ARM_FEATURE_DOTPROD
#define INSTRUCTIONS "NEON with dot product"
enum { LANES = 16 };
typedef int8_t digit_t;
typedef int8x16_t digits;
static inline digits load_digits(const digit_t* p) { return vld1q_s8(p); }
static inline digits load_int8(const int8_t* p) { return vld1q_s8(p); }
static inline digits high_halves(digits bytes) { return vshrq_n_s8(bytes, 4); }
static inline digits low_halves(digits bytes) { return vshrq_n_s8(vshlq_n_s8(bytes, 4), 4); }
static inline sums add_products(sums s, digits a, digits b) { return vdotq_s32(s, a, b); }
#else
#define INSTRUCTIONS "NEON"
enum { LANES = 8 };
typedef int16_t digit_t;
typedef int16x8_t digits;
static inline digits load_digits(const digit_t* p) { return vld1q_s16(p); }
static inline digits load_int8(const int8_t* p) { return vmovl_s8(vld1_s8(p)); }
static inline digits high_halves(digits bytes) { return vshrq_n_s16(bytes, 4); }
static inline digits low_halves(digits bytes) { return vshrq_n_s16(vshlq_n_s16(bytes, 12), 12); }
static inline sums add_products(sums s, digits a, digits b) {
    return vmlal_high_s16(vmlal_s16(s, vget_low_s16(a), vget_low_s16(b)), a, b);
}
#endif
static inline floats from_sums(sums s) { return vcvtq_f32_s32(s); }
static inline floats load_int32(const int32_t* p) { return vcvtq_f32_s32(vld1q_s32(p)); }

#else
#define INSTRUCTIONS "portable C"
enum { FLOATS = 8, LANES = 8, TILE_N = 2, TILE_M = 2, BLOCK = 2048 };
typedef struct {
    float of[FLOATS];
} floats;
typedef struct {
    int16_t of[LANES];
} digits;
typedef struct {
    int32_t of[LANES];
} sums;
typedef int16_t digit_t;
#define EACH(count) for (int i = 0; i < (count); i++)
static inline floats zeros(void) {
    floats v;
    EACH(FLOATS) v.of[i] = 0;
    return v;
}
static inline floats all(float f) {
    floats v;
    EACH(FLOATS) v.of[i] = f;
    return v;
}
static inline floats load(const float* p) {
    floats v;
    EACH(FLOATS) v.of[i] = p[i];
    return v;
}
static inline void store(float* p, floats v) { EACH(FLOATS) p[i] = v.of[i]; }
static inline floats add(floats a, floats b) {
    EACH(FLOATS) a.of[i] += b.of[i];
    return a;
}
static inline floats multiply_add(floats a, floats b, floats c) {
    EACH(FLOATS) c.of[i] += a.of[i] * b.of[i];
    return c;
}
static inline float total(floats v) {
    float sum = 0;
    EACH(FLOATS) sum += v.of[i];
    return sum;
}
static inline floats load_half(const uint16_t* p) {
    floats v;
    EACH(FLOATS) v.of[i] = from_half(p[i]);
    return v;
}
static inline void store_half(uint16_t* p, floats v) { EACH(FLOATS) p[i] = to_half(v.of[i]); }
static inline floats load_bfloat(const uint16_t* p) {
    floats v;
    EACH(FLOATS) v.of[i] = from_bfloat(p[i]);
    return v;
}
static inline digits load_digits(const digit_t* p) {
    digits v;
    EACH(LANES) v.of[i] = p[i];
    return v;
}
static inline digits load_int8(const int8_t* p) {
    digits v;
    EACH(LANES) v.of[i] = p[i];
    return v;
}
static inline digits high_halves(digits v) {
    EACH(LANES) v.of[i] = high_half((int8_t)v.of[i]);
    return v;
}
static inline digits low_halves(digits v) {
    EACH(LANES) v.of[i] = low_half((int8_t)v.of[i]);
    return v;
}
static inline sums no_sums(void) {
    sums s;
    EACH(LANES) s.of[i] = 0;
    return s;
}
static inline sums add_products(sums s, digits a, digits b) {
    EACH(LANES) s.of[i] += a.of[i] * b.of[i];
    return s;
}
static inline floats from_sums(sums s) {
    floats v;
    EACH(LANES) v.of[i] = (float)s.of[i];
    return v;
}
static inline floats load_int32(const int32_t* p) {
    floats v;
    EACH(FLOATS) v.of[i] = (float)p[i];
    return v;
}
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

static inline floats load_any(const void* p, int dtype, int64_t i) {
    if (dtype == FLOAT) return load((const float*)p + i);
    return dtype == HALF ? load_half((const uint16_t*)p + i) : load_bfloat((const uint16_t*)p + i);
}
