// What 8-bit attention reads: queries and keys after RMS norm and rotation, values transposed, all in e4m3.
//
// One pass over the projections of a joint sequence (text first, then picture): a block takes 128 tokens of one head.
// Within each run of 32 keys the values are put in the order in which a thread of wgmma's D holds its scores.
#pragma once
#include "../kernels.h"
#include "pairs.cuh"
#include "ptx.cuh"

namespace nibble::sm90a {

constexpr int kInputTokens = 128, kInputThreads = 256, kHeadElements = 128;
constexpr int kValueRow = kInputTokens + 4;  // bytes: the padding spreads a column over the banks

__device__ inline void load_four(const __nv_bfloat16* from, float (&v)[4]) {
  unpack_four(*reinterpret_cast<const uint2*>(from), v);
}

// x / rms(x) * weight, then each pair of elements turned by the token's angle. A lane holds four of the 128 elements.
__device__ inline void norm_and_rotate(float (&v)[4], const float (&weight)[4], const float4& cosine,
                                       const float4& sine, float eps, float scale) {
  float squares = v[0] * v[0] + v[1] * v[1] + v[2] * v[2] + v[3] * v[3];
#pragma unroll
  for (int step = 16; step; step /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, step);
  const float inverse = rsqrtf(squares * (1.0f / kHeadElements) + eps);
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] *= inverse * weight[i];
  const float a = v[0] * cosine.x - v[1] * sine.x, b = v[1] * cosine.y + v[0] * sine.y;
  const float c = v[2] * cosine.z - v[3] * sine.z, d = v[3] * cosine.w + v[2] * sine.w;
  v[0] = a * scale, v[1] = b * scale, v[2] = c * scale, v[3] = d * scale;
}

// Where key k of a run of 32 lies: a thread's scores of keys 8j + 2c + {0, 1} become its bytes 4c + ... of operand A.
__device__ inline int value_position(int key) {
  const int r = key % 16;
  return (key & ~15) + r % 8 / 2 * 4 + r / 8 * 2 + r % 2;
}

__global__ void __launch_bounds__(kInputThreads) attention_inputs_kernel(const __grid_constant__ AttentionInputs p) {
  __shared__ uint8_t values[kHeadElements * kValueRow];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y, batch = blockIdx.z;
  const int64_t plane = int64_t{batch} * p.heads + head;
  const int width = p.heads * kHeadElements;
  for (int t = warp; t < kInputTokens; t += kInputThreads / 32) {
    const int token = blockIdx.x * kInputTokens + t;
    float q[4], k[4], v[4] = {};
    if (token < p.tokens) {
      const bool text = token < p.text_tokens;
      const auto* row = static_cast<const __nv_bfloat16*>(text ? p.text : p.picture);
      const int64_t at = text ? int64_t{batch} * p.text_tokens + token
                              : int64_t{batch} * (p.tokens - p.text_tokens) + token - p.text_tokens;
      row += at * (text ? p.text_stride : p.picture_stride) + head * kHeadElements + lane * 4;
      load_four(row, q);
      load_four(row + width, k);
      load_four(row + 2 * width, v);
      float wq[4], wk[4];
      load_four(static_cast<const __nv_bfloat16*>(text ? p.text_norm_q : p.norm_q) + lane * 4, wq);
      load_four(static_cast<const __nv_bfloat16*>(text ? p.text_norm_k : p.norm_k) + lane * 4, wk);
      const int64_t angle = int64_t{token} * (kHeadElements / 4) + lane;
      const float4 cosine = reinterpret_cast<const float4*>(p.cosine)[angle];
      const float4 sine = reinterpret_cast<const float4*>(p.sine)[angle];
      norm_and_rotate(q, wq, cosine, sine, p.eps, p.qk_scale);
      norm_and_rotate(k, wk, cosine, sine, p.eps, p.qk_scale);
      const int64_t to = (plane * p.tokens + token) * (kHeadElements / 4) + lane;
      reinterpret_cast<uint32_t*>(p.q)[to] = pack_e4m3(q[0], q[1], q[2], q[3]);
      reinterpret_cast<uint32_t*>(p.k)[to] = pack_e4m3(k[0], k[1], k[2], k[3]);
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] *= p.v_scale;
    }
    const uint32_t packed = pack_e4m3(v[0], v[1], v[2], v[3]);
    const int place = (t & ~31) + value_position(t % 32);
#pragma unroll
    for (int i = 0; i < 4; ++i) values[(lane * 4 + i) * kValueRow + place] = packed >> (8 * i);
  }
  __syncthreads();
  for (int row = warp; row < kHeadElements; row += kInputThreads / 32) {
    auto* to = p.v + (plane * kHeadElements + row) * p.padded_tokens + blockIdx.x * kInputTokens;
    reinterpret_cast<uint32_t*>(to)[lane] = *reinterpret_cast<const uint32_t*>(values + row * kValueRow + lane * 4);
  }
}

}  // namespace nibble::sm90a
