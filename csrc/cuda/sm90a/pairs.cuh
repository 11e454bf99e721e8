// Floats of 16 bits, two to a word, and of 8 bits, four to a word; the first in the lowest bits.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace nibble::sm90a {

__device__ inline void unpack_two(uint32_t word, float& low, float& high) {
  low = __uint_as_float(word << 16);
  high = __uint_as_float(word & 0xffff0000u);
}

__device__ inline uint32_t pack_two(float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(v);
}

__device__ inline uint32_t pack_two_halves(float low, float high) {
  const __half2 v = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(v);
}

__device__ inline void unpack_four(const uint2& raw, float (&v)[4]) {
  unpack_two(raw.x, v[0], v[1]);
  unpack_two(raw.y, v[2], v[3]);
}

__device__ inline void unpack_eight(const uint4& raw, float (&v)[8]) {
  unpack_two(raw.x, v[0], v[1]);
  unpack_two(raw.y, v[2], v[3]);
  unpack_two(raw.z, v[4], v[5]);
  unpack_two(raw.w, v[6], v[7]);
}

__device__ inline uint4 pack_eight(const float (&v)[8]) {
  return {pack_two(v[0], v[1]), pack_two(v[2], v[3]), pack_two(v[4], v[5]), pack_two(v[6], v[7])};
}

__device__ inline uint32_t pack_e4m3(float a, float b, float c, float d) {
  uint32_t packed;
  asm("{\n.reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}"
      : "=r"(packed)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return packed;
}

}  // namespace nibble::sm90a
