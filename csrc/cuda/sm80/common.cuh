// What the kernels for Ampere and everything after it share: 16-bit numbers, vector loads, integer products.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../kernels.h"

namespace nibble::sm80 {

__device__ inline float widen(uint32_t bits, DType dtype) {
  return dtype == DType::bf16 ? __uint_as_float(bits << 16)
                              : __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

// Two 16-bit numbers of a word, the low half first.
__device__ inline float2 widen_two(uint32_t word, DType dtype) {
  return {widen(word & 0xffffu, dtype), widen(word >> 16, dtype)};
}

__device__ inline float to_float(float v) {
  return v;
}
__device__ inline float to_float(__nv_bfloat16 v) {
  return __bfloat162float(v);
}
__device__ inline float to_float(__half v) {
  return __half2float(v);
}

// y[at] = v, rounded once.
__device__ inline void store(void* y, DType dtype, int64_t at, float v) {
  if (dtype == DType::fp32) {
    static_cast<float*>(y)[at] = v;
  } else if (dtype == DType::bf16) {
    static_cast<__nv_bfloat16*>(y)[at] = __float2bfloat16_rn(v);
  } else {
    static_cast<__half*>(y)[at] = __float2half_rn(v);
  }
}

// v rounded to `dtype`, as numbers of that type are.
__device__ inline void round_four(DType dtype, float (&v)[4]) {
#pragma unroll
  for (float& value : v) {
    if (dtype == DType::bf16) value = __bfloat162float(__float2bfloat16_rn(value));
    if (dtype == DType::fp16) value = __half2float(__float2half_rn(value));
  }
}

__device__ inline uint32_t round_two_bf16(float2 v) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(v.x, v.y);
  return reinterpret_cast<const uint32_t&>(two);
}

__device__ inline uint32_t round_two(float low, float high, DType dtype) {
  if (dtype == DType::bf16) return round_two_bf16({low, high});
  const __half2 two = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(two);
}

// y[at..at+3] = v, each rounded once, in one piece.
__device__ inline void store_four(void* y, DType dtype, int64_t at, const float (&v)[4]) {
  if (dtype == DType::fp32) {
    *reinterpret_cast<float4*>(static_cast<float*>(y) + at) = {v[0], v[1], v[2], v[3]};
  } else {
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(y) + at) = {round_two(v[0], v[1], dtype),
                                                                 round_two(v[2], v[3], dtype)};
  }
}

// GELU in its tanh form, operation by operation as torch computes it for numbers of any type.
__device__ inline float gelu(float v) {
  constexpr float kBeta = 0.7978845608028654f, kKappa = 0.044715f;  // sqrt(2 / pi)
  const float cube = v * v * v;
  return 0.5f * v * (1.0f + tanhf(kBeta * (v + kKappa * cube)));
}

// 16 bytes, or 4, from device to shared memory, by and by; zeros where they are not real.
__device__ inline void copy_16(void* to, const void* from, bool real) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(real ? 16 : 0) : "memory");
}
__device__ inline void copy_4(void* to, const void* from, bool real) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(at), "l"(from), "r"(real ? 4 : 0) : "memory");
}
__device__ inline void close_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kLeft>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// d (16,8) = a (16,32) b (32,8) + c, 8-bit integers, sums of 32 bits; a is unsigned, or signed as b is.
template <bool kUnsigned>
__device__ inline void multiply_8bit(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const int (&c)[4]) {
  if constexpr (kUnsigned) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
  } else {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
  }
}

// The same with 4-bit integers, a (16,64) b (64,8): one instruction on 8.x; ptxas spells it out for what came later.
template <bool kUnsigned>
__device__ inline void multiply_4bit(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const int (&c)[4]) {
  if constexpr (kUnsigned) {
    asm("mma.sync.aligned.m16n8k64.row.col.s32.u4.s4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
  } else {
    asm("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
  }
}

// d (16,8) += a (16,16) b (16,8) in bf16 or fp16, sums in fp32.
template <class T>
__device__ inline void multiply_16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (sizeof(T) == 2 && __is_same(T, __half)) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

inline Status launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace nibble::sm80
