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

// d (16,8) += a (16,32) b (32,8), 8-bit integers, sums of 32 bits.
__device__ inline void multiply_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
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
