/* AVX2 with FMA and F16C, with or without AVX-VNNI. What each operation does is said in portable.h, and what VNNI
   changes in avx512.h. Loads and stores need no alignment. */
#pragma once

#include <immintrin.h>
enum { FLOATS = 8, PLAIN_N = 4, PLAIN_M = 2 };
#define KEEP_IN_REGISTER(v) __asm__("" : "+v"(v)) /* as in avx512.h */
typedef __m256 floats;
static inline floats zeros(void) { return _mm256_setzero_ps(); }
static inline floats broadcast(float f) { return _mm256_set1_ps(f); }
static inline floats load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, floats v) { _mm256_storeu_ps(p, v); }
static inline floats add(floats a, floats b) { return _mm256_add_ps(a, b); }
static inline floats multiply_add(floats a, floats b, floats c) { return _mm256_fmadd_ps(a, b, c); }
static inline float reduce_add(floats v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
static inline floats load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const void*)p)); }
static inline void store_half(uint16_t* p, floats v) { _mm_storeu_si128((void*)p, _mm256_cvtps_ph(v, 0)); }
static inline floats load_bfloat(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void*)p)), 16));
}
typedef __m256i limbs;
typedef int32_t sums __attribute__((vector_size(32)));
static inline sums no_sums(void) { return (sums)_mm256_setzero_si256(); }
static inline sums load_sums(const int32_t* p) { return (sums)_mm256_loadu_si256((const void*)p); }
static inline void store_sums(int32_t* p, sums s) { _mm256_storeu_si256((void*)p, (__m256i)s); }
#ifdef __AVXVNNI__
#define INSTRUCTIONS "AVX2 with VNNI"
#define UNSIGNED_WEIGHTS 1
enum { LANES = 32, BLOCK = 1024 };
typedef int8_t limb_t;
static inline limbs load_limbs(const limb_t* p) { return _mm256_loadu_si256((const void*)p); }
static inline limbs flip_signs(limbs bytes) { return _mm256_xor_si256(bytes, _mm256_set1_epi8(-128)); }
static inline limbs load_int8(const int8_t* p) { return flip_signs(load_limbs(p)); }
static inline limbs high_nibbles(limbs bytes) {
    return _mm256_and_si256(_mm256_srli_epi16(bytes, 4), _mm256_set1_epi8(15));
}
static inline limbs low_nibbles(limbs bytes) {
    return _mm256_xor_si256(_mm256_and_si256(bytes, _mm256_set1_epi8(15)), _mm256_set1_epi8(8));
}
static inline limbs broadcast4(const void* p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
}
static inline limbs broadcast8(const void* p) {
    int64_t eight;
    memcpy(&eight, p, 8);
    return _mm256_set1_epi64x(eight);
}
static inline sums add_products(sums s, limbs weights, limbs x) {
    return (sums)_mm256_dpbusd_avx_epi32((__m256i)s, weights, x);
}
static inline sums subtract_multiple(sums s, limbs x, uint8_t times) {
    return s - add_products(no_sums(), _mm256_set1_epi8((char)times), x);
}
static inline sums join_sums(sums high, sums low) {
    return (sums)_mm256_add_epi32(_mm256_slli_epi32((__m256i)high, 8), (__m256i)low);
}
static inline sums add_lane_pairs(sums s) { return s + (sums)_mm256_shuffle_epi32((__m256i)s, 0xb1); }
enum { BYTE_N = 4 };
#define FOR_BYTE_N(DO) DO(0) DO(1) DO(2) DO(3)
#else
#define INSTRUCTIONS "AVX2"
#define UNSIGNED_WEIGHTS 0
enum { LANES = 16, BLOCK = 2048 };
typedef int16_t limb_t;
static inline limbs load_limbs(const limb_t* p) { return _mm256_loadu_si256((const void*)p); }
static inline limbs load_int8(const int8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const void*)p)); }
static inline limbs high_nibbles(limbs bytes) { return _mm256_srai_epi16(bytes, 4); }
static inline limbs low_nibbles(limbs bytes) { return _mm256_srai_epi16(_mm256_slli_epi16(bytes, 12), 12); }
static inline sums add_products(sums s, limbs a, limbs b) { return s + (sums)_mm256_madd_epi16(a, b); }
static inline sums subtract_multiple(sums s, limbs x, uint8_t times) {
    return s - add_products(no_sums(), _mm256_set1_epi16(times), x);
}
#endif
static inline floats from_sums(sums s) { return _mm256_cvtepi32_ps((__m256i)s); }
static inline floats load_int32(const int32_t* p) { return _mm256_cvtepi32_ps(_mm256_loadu_si256((const void*)p)); }

enum { CAN_TRANSPOSE = 0 }; /* linear.h goes number by number */
#define transpose(rows, scale, bias, to, stride) (void)(rows)
