// Values as 8-bit attention reads them: transposed, in e4m3. A block takes 128 tokens of one head.
//
// Within each run of 32 keys they are put in the order in which a thread of wgmma's D holds its scores.
#pragma once
#include "attention.cuh"

namespace nibble::sm90a {

constexpr int kValueTokens = kKeys, kValueThreads = 256;
constexpr int kValueRow = kValueTokens + 4;  // bytes: the padding spreads a column over the banks

// Where key k of a run of 32 lies: a thread's scores of keys 8j + 2c + {0, 1} become its bytes 4c + ... of operand A.
__device__ inline int value_position(int key) {
  const int r = key % 16;
  return (key & ~15) + r % 8 / 2 * 4 + r / 8 * 2 + r % 2;
}

// values: (batch * heads, 128, padded_tokens), a multiple of 128; zeros past the end.
__global__ void __launch_bounds__(kValueThreads)
    attention_values_kernel(const __grid_constant__ Attention p, int padded_tokens) {
  __shared__ uint8_t values[kHead * kValueRow];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y, batch = blockIdx.z;
  const int first = blockIdx.x * kValueTokens;
  const auto* from = static_cast<const __nv_bfloat16*>(p.v.data) + batch * p.v.batch_stride + head * kHead;
#pragma unroll 4
  for (int t = warp; t < kValueTokens; t += kValueThreads / 32) {
    float v[4] = {};
    if (first + t < p.tokens) {
      unpack_four(*reinterpret_cast<const uint2*>(from + (first + t) * p.v.token_stride + lane * 4), v);
    }
    const uint32_t packed = pack_e4m3(v[0] * p.v_scale, v[1] * p.v_scale, v[2] * p.v_scale, v[3] * p.v_scale);
    const int place = (t & ~31) + value_position(t % 32);
#pragma unroll
    for (int i = 0; i < 4; ++i) values[(lane * 4 + i) * kValueRow + place] = packed >> (8 * i);
  }
  __syncthreads();
  const int64_t plane = int64_t{batch} * p.heads + head;
  for (int row = warp; row < kHead; row += kValueThreads / 32) {
    auto* to = p.values + (plane * kHead + row) * padded_tokens + first;
    reinterpret_cast<uint32_t*>(to)[lane] = *reinterpret_cast<const uint32_t*>(values + row * kValueRow + lane * 4);
  }
}

}  // namespace nibble::sm90a
