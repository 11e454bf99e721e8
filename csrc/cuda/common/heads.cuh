// Eight neighbouring elements of an attention head, and what becomes of a query or key before attention.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace nibble {
namespace {  // each architecture's file has its own copy: the linker must never take one for another

constexpr int kHead = 128, kLanes = kHead / 8;  // lanes of a warp that share a head

struct Eight {
  float at[8];

  Eight() = default;
  __device__ explicit Eight(const uint4& raw) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      at[2 * i] = __uint_as_float(words[i] << 16);
      at[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
  __device__ uint4 rounded() const {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __nv_bfloat162 two = __floats2bfloat162_rn(at[2 * i], at[2 * i + 1]);
      words[i] = reinterpret_cast<const uint32_t&>(two);
    }
    return {words[0], words[1], words[2], words[3]};
  }
};

// Cosine and sine of four pairs of elements, those of lane `part` at a position. angles: (positions,64,2) fp16, whose
// eleven bits are three more than the result keeps; they come from the L2 for every head again, so bytes count.
__device__ inline uint4 angles_at(const void* angles, int64_t position, int part) {
  return static_cast<const uint4*>(angles)[position * kLanes + part];
}

// x / rms(x) * weight, rounded as torch does between the two, then each pair of elements turned by its angle.
__device__ inline uint4 norm_and_rotate(const uint4& raw, const Eight& weight, const uint4& angles, float eps) {
  Eight v(raw), turned;
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) squares = fmaf(v.at[i], v.at[i], squares);
#pragma unroll
  for (int step = kLanes / 2; step; step /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, step);
  const float inverse = rsqrtf(squares * (1.0f / kHead) + eps);
#pragma unroll
  for (int i = 0; i < 8; ++i) v.at[i] *= inverse * weight.at[i];
  v = Eight(v.rounded());
  const uint32_t words[4] = {angles.x, angles.y, angles.z, angles.w};
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    const float2 angle = __half22float2(reinterpret_cast<const __half2&>(words[i / 2]));
    turned.at[i] = fmaf(v.at[i], angle.x, -(v.at[i + 1] * angle.y));
    turned.at[i + 1] = fmaf(v.at[i + 1], angle.x, v.at[i] * angle.y);
  }
  return turned.rounded();
}

}  // namespace
}  // namespace nibble
