/* AVX512 (F, BW, DQ, VL), with or without VNNI. What each operation does is said in portable.h.

   With VNNI a product takes four unsigned and four signed bytes: weights get 128 (int8) or 8 (int4) added, and sums
   start with minus what that adds. Without it limbs are int16. Loads and stores need no alignment. */
#pragma once

#include <immintrin.h>
#define ISA_AVX512
enum { FLOATS = 16, BLOCK = 1024, PLAIN_N = 4, PLAIN_M = 4 };
#define KEEP_IN_REGISTER(v) __asm__("" : "+v"(v)) /* in a register: gcc would load it again for each use */
typedef __m512 floats;
static inline floats zeros(void) { return _mm512_setzero_ps(); }
static inline floats broadcast(float f) { return _mm512_set1_ps(f); }
static inline floats load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, floats v) { _mm512_storeu_ps(p, v); }
static inline floats add(floats a, floats b) { return _mm512_add_ps(a, b); }
static inline floats multiply_add(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
static inline float reduce_add(floats v) { return _mm512_reduce_add_ps(v); }
static inline floats load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void*)p)); }
static inline void store_half(uint16_t* p, floats v) { _mm256_storeu_si256((void*)p, _mm512_cvtps_ph(v, 0)); }
static inline floats load_bfloat(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void*)p)), 16));
}
typedef __m512i limbs;
typedef int32_t sums __attribute__((vector_size(64))); /* not __m512i, which gcc 12 copies to and fro */
static inline sums no_sums(void) { return (sums)_mm512_setzero_si512(); }
static inline sums load_sums(const int32_t* p) { return (sums)_mm512_loadu_si512(p); }
static inline void store_sums(int32_t* p, sums s) { _mm512_storeu_si512(p, (__m512i)s); }
#ifdef __AVX512VNNI__ /* a product of four unsigned by four signed bytes */
#define INSTRUCTIONS "AVX512 with VNNI"
#define UNSIGNED_WEIGHTS 1
enum { LANES = 64 };
typedef int8_t limb_t;
static inline limbs load_limbs(const limb_t* p) { return _mm512_loadu_si512(p); }
static inline limbs flip_signs(limbs bytes) { return _mm512_xor_si512(bytes, _mm512_set1_epi8(-128)); }
static inline limbs load_int8(const int8_t* p) { return flip_signs(_mm512_loadu_si512(p)); }
static inline limbs high_nibbles(limbs bytes) {
    return _mm512_and_si512(_mm512_srli_epi16(bytes, 4), _mm512_set1_epi8(15));
}
static inline limbs low_nibbles(limbs bytes) {
    return _mm512_xor_si512(_mm512_and_si512(bytes, _mm512_set1_epi8(15)), _mm512_set1_epi8(8));
}
static inline limbs broadcast4(const void* p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
}
static inline limbs broadcast8(const void* p) {
    int64_t eight;
    memcpy(&eight, p, 8);
    limbs v = _mm512_set1_epi64(eight);
#ifdef __clang__
    KEEP_IN_REGISTER(v); /* clang 16 crashes on a broadcast of 8 bytes that flip_signs follows */
#endif
    return v;
}
static inline sums add_products(sums s, limbs weights, limbs x) {
    return (sums)_mm512_dpbusd_epi32((__m512i)s, weights, x);
}
static inline sums subtract_multiple(sums s, limbs x, uint8_t times) { /* s - times · x */
    return s - add_products(no_sums(), _mm512_set1_epi8((char)times), x);
}
static inline sums join_sums(sums high, sums low) { /* 256 · high + low; may wrap around on the way */
    return (sums)_mm512_add_epi32(_mm512_slli_epi32((__m512i)high, 8), (__m512i)low);
}
static inline sums add_lane_pairs(sums s) { /* in both places of a pair */
    return s + (sums)_mm512_shuffle_epi32((__m512i)s, _MM_PERM_CDAB);
}
enum { BYTE_N = 8 };
#define FOR_BYTE_N(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7)
#else
#define INSTRUCTIONS "AVX512"
#define UNSIGNED_WEIGHTS 0
enum { LANES = 32 };
typedef int16_t limb_t;
static inline limbs load_limbs(const limb_t* p) { return _mm512_loadu_si512(p); }
static inline limbs load_int8(const int8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const void*)p)); }
static inline limbs high_nibbles(limbs bytes) { return _mm512_srai_epi16(bytes, 4); }
static inline limbs low_nibbles(limbs bytes) { return _mm512_srai_epi16(_mm512_slli_epi16(bytes, 12), 12); }
static inline sums add_products(sums s, limbs a, limbs b) { return s + (sums)_mm512_madd_epi16(a, b); }
static inline sums subtract_multiple(sums s, limbs x, uint8_t times) {
    return s - add_products(no_sums(), _mm512_set1_epi16(times), x);
}
#endif
static inline floats from_sums(sums s) { return _mm512_cvtepi32_ps((__m512i)s); }
static inline floats load_int32(const int32_t* p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }

enum { CAN_TRANSPOSE = 1 };
_Static_assert(FLOATS == 16, "transpose has 16 rows of 16");
/* to[i][n] = rows[n][i] · scale[n] + bias[n], 16 by 16; rows of `to` lie `stride` floats apart. */
static void transpose(const float* const* rows, floats scale, floats bias, float* to, int64_t stride) {
    __m512 one[16], two[16];
    for (int i = 0; i < 16; i += 2) { /* interleave two rows, then four */
        __m512 a = load(rows[i]), b = load(rows[i + 1]);
        one[i] = _mm512_unpacklo_ps(a, b), one[i + 1] = _mm512_unpackhi_ps(a, b);
    }
    for (int i = 0; i < 16; i += 4)
        for (int k = 0; k < 2; k++) {
            __m512d a = _mm512_castps_pd(one[i + k]), b = _mm512_castps_pd(one[i + k + 2]);
            two[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            two[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    for (int i = 0; i < 4; i++) { /* lane l of two[4·r + i] has column 4·l + i of rows 4·r to 4·r + 3 */
        __m512 a = two[i], b = two[4 + i], c = two[8 + i], d = two[12 + i];
        __m512 even0 = _mm512_shuffle_f32x4(a, b, 0x88), odd0 = _mm512_shuffle_f32x4(a, b, 0xdd);
        __m512 even1 = _mm512_shuffle_f32x4(c, d, 0x88), odd1 = _mm512_shuffle_f32x4(c, d, 0xdd);
        store(to + i * stride, multiply_add(_mm512_shuffle_f32x4(even0, even1, 0x88), scale, bias));
        store(to + (4 + i) * stride, multiply_add(_mm512_shuffle_f32x4(odd0, odd1, 0x88), scale, bias));
        store(to + (8 + i) * stride, multiply_add(_mm512_shuffle_f32x4(even0, even1, 0xdd), scale, bias));
        store(to + (12 + i) * stride, multiply_add(_mm512_shuffle_f32x4(odd0, odd1, 0xdd), scale, bias));
    }
}
