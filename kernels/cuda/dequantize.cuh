// INT8 and INT4 weights to pairs of half or bfloat16, in registers.
#pragma once

#include "kernels/cuda/common.cuh"

// Four weights of a word, in order, as two pairs. A byte b in the low bits of 0x6400 is the half 1024 + b.
__device__ __forceinline__ void widen8(u32 w, u32* out) {
#if BF16
    // 0x4300 is 128 with a unit in its last place: seven bits fit, and the sign bit is subtracted as 0 or 128.
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
// Eight nibbles of a word, in order (the even column is the high nibble), as four pairs.
__device__ __forceinline__ void widen4(u32 w, u32* out) {
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
