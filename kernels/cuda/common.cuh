// Types, programmatic dependent launch (PDL) and asynchronous copies, for every kernel.
//
// Compiled with BF16=1 for bfloat16 activations, BF16=0 for half. Includes name files from the root of the repository.
// No header of CUDA is included: NVRTC takes half as long without them.
#pragma once

typedef unsigned int u32;
typedef unsigned short u16;  // the bits of a half or a bfloat16

#if BF16
__device__ __forceinline__ float to_float(u16 v) { return __uint_as_float((u32)v << 16); }
__device__ __forceinline__ u16 to_u16(float f) {
    u16 r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(f));
    return r;
}
#else
__device__ __forceinline__ float to_float(u16 v) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
    return f;
}
__device__ __forceinline__ u16 to_u16(float f) {
    u16 r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(f));
    return r;
}
#endif
__device__ __forceinline__ float low(u32 v) { return to_float((u16)v); }
__device__ __forceinline__ float high(u32 v) { return to_float((u16)(v >> 16)); }
__device__ __forceinline__ u32 pack(float a, float b) { return (u32)to_u16(a) | ((u32)to_u16(b) << 16); }

// Lets the next kernel of the stream start early. It may read weights, but results of this one only after pdl_wait().
// Both do nothing in a launch without the PDL attribute.
__device__ __forceinline__ void pdl_launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void pdl_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#if __CUDA_ARCH__ >= 750
#define L2_LINE ".L2::128B"  // L2 prefetch of the whole line
#else
#define L2_LINE ""
#endif
// Loads 16 bytes past L1, for data that is read once; zeros if not inside.
__device__ __forceinline__ uint4 load_streaming(const void* p, bool inside = true) {
    uint4 v;
    asm volatile(
        "{ .reg .pred inside; setp.ne.s32 inside, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0;"
        " mov.u32 %3, 0; @inside ld.global.nc.L1::no_allocate" L2_LINE ".v4.u32 {%0,%1,%2,%3}, [%4]; }"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
        : "l"(p), "r"((int)inside));
    return v;
}

// Copies 16 bytes to shared memory, zeros if not inside: asynchronous from sm_80 on, at once before.
__device__ __forceinline__ void cp_async(void* to, const void* from, bool inside) {
#if __CUDA_ARCH__ >= 800
    u32 address = (u32)__cvta_generic_to_shared(to);
    int bytes = inside ? 16 : 0;  // cp.async fills the rest with zeros
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes)
                 : "memory");
#else
    *(uint4*)to = inside ? *(const uint4*)from : make_uint4(0, 0, 0, 0);
#endif
}
__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int LEFT>
__device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#endif
}

__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
