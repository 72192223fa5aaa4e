/* NEON of AArch64, with or without its dot product, which takes int8 limbs. What each operation does is said in
   portable.h. Loads and stores need no alignment. */
#pragma once

#include <arm_neon.h>
#define UNSIGNED_WEIGHTS 0
#define KEEP_IN_REGISTER(v) __asm__("" : "+w"(v)) /* in a register: gcc would load it again for each use */
enum { FLOATS = 4, BLOCK = 1024, PLAIN_N = 4, PLAIN_M = 4 };
typedef float32x4_t floats;
typedef int32x4_t sums;
static inline floats zeros(void) { return vdupq_n_f32(0); }
static inline floats broadcast(float f) { return vdupq_n_f32(f); }
static inline floats load(const float* p) { return vld1q_f32(p); }
static inline void store(float* p, floats v) { vst1q_f32(p, v); }
static inline floats add(floats a, floats b) { return vaddq_f32(a, b); }
static inline floats multiply_add(floats a, floats b, floats c) { return vfmaq_f32(c, a, b); }
static inline float reduce_add(floats v) { return vaddvq_f32(v); }
static inline floats load_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
static inline void store_half(uint16_t* p, floats v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
static inline floats load_bfloat(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
static inline sums no_sums(void) { return vdupq_n_s32(0); }
static inline sums load_sums(const int32_t* p) { return vld1q_s32(p); }
static inline void store_sums(int32_t* p, sums s) { vst1q_s32(p, s); }
#ifdef __ARM_FEATURE_DOTPROD
#define INSTRUCTIONS "NEON with dot product"
enum { LANES = 16 };
typedef int8_t limb_t;
typedef int8x16_t limbs;
static inline limbs load_limbs(const limb_t* p) { return vld1q_s8(p); }
static inline limbs load_int8(const int8_t* p) { return vld1q_s8(p); }
static inline limbs high_nibbles(limbs bytes) { return vshrq_n_s8(bytes, 4); }
static inline limbs low_nibbles(limbs bytes) { return vshrq_n_s8(vshlq_n_s8(bytes, 4), 4); }
static inline sums add_products(sums s, limbs a, limbs b) { return vdotq_s32(s, a, b); }
static inline sums subtract_multiple(sums s, limbs x, uint8_t times) {
    return add_products(s, vdupq_n_s8((int8_t)-times), x);
}
#else
#define INSTRUCTIONS "NEON"
enum { LANES = 8 };
typedef int16_t limb_t;
typedef int16x8_t limbs;
static inline limbs load_limbs(const limb_t* p) { return vld1q_s16(p); }
static inline limbs load_int8(const int8_t* p) { return vmovl_s8(vld1_s8(p)); }
static inline limbs high_nibbles(limbs bytes) { return vshrq_n_s16(bytes, 4); }
static inline limbs low_nibbles(limbs bytes) { return vshrq_n_s16(vshlq_n_s16(bytes, 12), 12); }
static inline sums add_products(sums s, limbs a, limbs b) {
    return vmlal_high_s16(vmlal_s16(s, vget_low_s16(a), vget_low_s16(b)), a, b);
}
static inline sums subtract_multiple(sums s, limbs x, uint8_t times) {
    return add_products(s, vdupq_n_s16((int16_t)-times), x);
}
#endif
static inline floats from_sums(sums s) { return vcvtq_f32_s32(s); }
static inline floats load_int32(const int32_t* p) { return vcvtq_f32_s32(vld1q_s32(p)); }

enum { CAN_TRANSPOSE = 0 }; /* linear.h goes number by number */
#define transpose(rows, scale, bias, to, stride) (void)(rows)
