/* Plain C, and the reference for what the operations of an instruction set do.

   floats  FLOATS float32 numbers           limbs  LANES integers of type limb_t, LIMB_MAX at most
   sums    int32 accumulators, FLOATS of them (each takes LANES / FLOATS products at a time)
   BLOCK   columns, at most, whose products' sum is exact in int32 and whose limbs fit the nearest cache
   PLAIN_N, PLAIN_M   weight rows and rows of x that plain tiles keep in registers
   KEEP_IN_REGISTER   keeps gcc from loading a vector again for each use
   transpose          16 by 16 floats, if CAN_TRANSPOSE
   subtract_multiple  s - times · x, for times up to 128
   UNSIGNED_WEIGHTS   1 where load_int8 and the nibbles give weights with 128 or 8 added, unsigned
   Only then there are: broadcast4, broadcast8 (4 or 8 bytes everywhere), flip_signs (adds 128), join_sums (256 · high +
   low), add_lane_pairs (sums of lanes 2i and 2i + 1, in both), BYTE_N and FOR_BYTE_N (weight rows of a byte tile). */
#pragma once

#define INSTRUCTIONS "portable C"
#define UNSIGNED_WEIGHTS 0
#define KEEP_IN_REGISTER(v) (void)(v) /* nothing to keep */
enum { FLOATS = 8, LANES = 8, BLOCK = 2048, PLAIN_N = 2, PLAIN_M = 2 };
typedef struct {
    float of[FLOATS];
} floats;
typedef struct {
    int16_t of[LANES];
} limbs;
typedef struct {
    int32_t of[LANES];
} sums;
typedef int16_t limb_t;
#define EACH(count) for (int i = 0; i < (count); i++)
static inline floats zeros(void) {
    floats v;
    EACH(FLOATS) v.of[i] = 0;
    return v;
}
static inline floats broadcast(float f) {
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
static inline float reduce_add(floats v) {
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
static inline limbs load_limbs(const limb_t* p) {
    limbs v;
    EACH(LANES) v.of[i] = p[i];
    return v;
}
static inline limbs load_int8(const int8_t* p) {
    limbs v;
    EACH(LANES) v.of[i] = p[i];
    return v;
}
static inline limbs high_nibbles(limbs v) {
    EACH(LANES) v.of[i] = high_nibble((int8_t)v.of[i]);
    return v;
}
static inline limbs low_nibbles(limbs v) {
    EACH(LANES) v.of[i] = low_nibble((int8_t)v.of[i]);
    return v;
}
static inline sums no_sums(void) {
    sums s;
    EACH(LANES) s.of[i] = 0;
    return s;
}
static inline sums add_products(sums s, limbs a, limbs b) {
    EACH(LANES) s.of[i] += a.of[i] * b.of[i];
    return s;
}
static inline sums load_sums(const int32_t* p) {
    sums s;
    EACH(LANES) s.of[i] = p[i];
    return s;
}
static inline void store_sums(int32_t* p, sums s) { EACH(LANES) p[i] = s.of[i]; }
static inline sums subtract_multiple(sums s, limbs x, uint8_t times) {
    EACH(LANES) s.of[i] -= times * x.of[i];
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

enum { CAN_TRANSPOSE = 0 }; /* linear.h goes number by number */
#define transpose(rows, scale, bias, to, stride) (void)(rows)
