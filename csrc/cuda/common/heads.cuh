// Eight neighbouring elements of an attention head, and what becomes of a query or key before attention.
#pragma once
#include <cuda_bf16.h>

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
  __device__ explicit Eight(const float4* four) {
    const float4 a = four[0], b = four[1];
    at[0] = a.x, at[1] = a.y, at[2] = a.z, at[3] = a.w, at[4] = b.x, at[5] = b.y, at[6] = b.z, at[7] = b.w;
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

// The angles (cosine, sine) of four pairs of elements: of those of lane `part` at a position. angles: (positions,64,2).
__device__ inline Eight angles_at(const float* angles, int64_t position, int part) {
  return Eight(reinterpret_cast<const float4*>(angles + position * kHead) + part * 2);
}

// x / rms(x) * weight, rounded as torch does between the two, then each pair of elements turned by its angle.
__device__ inline uint4 norm_and_rotate(const uint4& raw, const Eight& weight, const Eight& angle, float eps) {
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
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    const float cosine = angle.at[i], sine = angle.at[i + 1];
    turned.at[i] = fmaf(v.at[i], cosine, -(v.at[i + 1] * sine));
    turned.at[i + 1] = fmaf(v.at[i + 1], cosine, v.at[i] * sine);
  }
  return turned.rounded();
}

}  // namespace
}  // namespace nibble
