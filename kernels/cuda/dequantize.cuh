// INT8 and INT4 weights to pairs of half or bfloat16, in registers and without the scale.
//
// The bits of an integer are put into the mantissa of a constant whose unit in the last place is 1; then the constant
// is subtracted. Source: Kim et al., "Who Says Elephants Can't Run", arXiv 2211.10017.
#pragma once

#include "kernels/cuda/common.cuh"

// Four bytes of w, in order, to two pairs. With b in its low byte, the half 0x6400 is 1024 + b.
__device__ __forceinline__ void dequantize_int8(u32 w, u32* out) {
#if BF16
    // 0x4300 is the bfloat16 128, whose mantissa takes seven bits. The sign bit makes 128 or 256 of it: subtract that.
    u32 a = __byte_perm(w, 0x43434343, 0x4140), b = __byte_perm(w, 0x43434343, 0x4342);
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out[0]) : "r"(a & 0xff80ff80), "r"(0xbf80bf80), "r"(a & 0xff7fff7f));
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out[1]) : "r"(b & 0xff80ff80), "r"(0xbf80bf80), "r"(b & 0xff7fff7f));
#else
    w ^= 0x80808080;
    u32 a = __byte_perm(w, 0x64646464, 0x4140), b = __byte_perm(w, 0x64646464, 0x4342);
    asm("sub.f16x2 %0, %1, %2;" : "=r"(out[0]) : "r"(a), "r"(0x64806480));
    asm("sub.f16x2 %0, %1, %2;" : "=r"(out[1]) : "r"(b), "r"(0x64806480));
#endif
}

// Eight nibbles of w to four pairs. In a byte, the high nibble is the even column.
__device__ __forceinline__ void dequantize_int4(u32 w, u32* out) {
    w ^= 0x88888888;
    const u32 s = w >> 4;
#if BF16
    const u32 magic = 0x43004300;  // 128 + n
#else
    const u32 magic = 0x64006400;  // 1024 + n
#endif
    u32 p[4] = {__byte_perm(s, w, 0x4440), __byte_perm(s, w, 0x5541), __byte_perm(s, w, 0x6662),
                __byte_perm(s, w, 0x7773)};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 v = (p[i] & 0x000f000f) | magic;
#if BF16
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out[i]) : "r"(v), "r"(0x3f803f80), "r"(0xc308c308));
#else
        asm("sub.f16x2 %0, %1, %2;" : "=r"(out[i]) : "r"(v), "r"(0x64086408));
#endif
    }
}

// Eight weights, the j-th eight of the 128 / bits in 16 bytes, to four pairs. 16 bits: they are half already.
template <int bits>
__device__ __forceinline__ void dequantize8(const u32* words, int j, u32* out) {
    if (bits == 8) {
        dequantize_int8(words[2 * j], out);
        dequantize_int8(words[2 * j + 1], out + 2);
    } else if (bits == 4) {
        dequantize_int4(words[j], out);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) out[i] = words[i];
    }
}
