// What 8-bit attention reads: queries and keys after RMS norm and rotation, values transposed, all in e4m3.
//
// One pass over the projections of a joint sequence (text first, then picture): a block takes 128 tokens of one head.
// Within each run of 32 keys the values are put in the order in which a thread of wgmma's D holds its scores.
//
// One vector is subtracted from all keys of a head, which changes no probability: a key's common part is the largest,
// and without it more bits are left for what differs. It is the mean of some of the keys.
#pragma once
#include "../kernels.h"
#include "pairs.cuh"
#include "ptx.cuh"

namespace nibble::sm90a {

constexpr int kInputTokens = 128, kInputThreads = 256, kHeadElements = 128;
constexpr int kValueRow = kInputTokens + 4;  // bytes: the padding spreads a column over the banks
constexpr int kSampled = 256;                // keys whose mean is taken

__device__ inline void load_four(const __nv_bfloat16* from, float (&v)[4]) {
  unpack_four(*reinterpret_cast<const uint2*>(from), v);
}

// x / rms(x) * weight, then each pair of elements turned by its angle (cosine and sine, fp16). A lane holds four of the
// 128 elements.
__device__ inline void norm_and_rotate(float (&v)[4], const float (&weight)[4], const uint2& angles, float eps,
                                       float scale) {
  float squares = v[0] * v[0] + v[1] * v[1] + v[2] * v[2] + v[3] * v[3];
#pragma unroll
  for (int step = 16; step; step /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, step);
  const float inverse = rsqrtf(squares * (1.0f / kHeadElements) + eps);
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] *= inverse * weight[i];
  const float2 one = __half22float2(reinterpret_cast<const __half2&>(angles.x));
  const float2 two = __half22float2(reinterpret_cast<const __half2&>(angles.y));
  const float a = v[0] * one.x - v[1] * one.y, b = v[1] * one.x + v[0] * one.y;
  const float c = v[2] * two.x - v[3] * two.y, d = v[3] * two.x + v[2] * two.y;
  v[0] = a * scale, v[1] = b * scale, v[2] = c * scale, v[3] = d * scale;
}

// A lane's four elements of a token of one head.
struct TokenOfHead {
  const AttentionInputs& p;
  const __nv_bfloat16* row;
  bool text;
  uint2 angles;

  __device__ TokenOfHead(const AttentionInputs& p, int64_t batch, int head, int token, int lane)
      : p(p), text(token < p.text_tokens) {
    const int64_t at =
        text ? batch * p.text_tokens + token : batch * (p.tokens - p.text_tokens) + token - p.text_tokens;
    row = static_cast<const __nv_bfloat16*>(text ? p.text : p.picture) +
          at * (text ? p.text_stride : p.picture_stride) + head * kHeadElements + lane * 4;
    angles = static_cast<const uint2*>(p.angles)[int64_t{token} * (kHeadElements / 4) + lane];
  }

  __device__ void rotated(const void* norm, int64_t from, float (&v)[4]) const {
    float weight[4];
    load_four(row + from, v);
    load_four(static_cast<const __nv_bfloat16*>(norm) + threadIdx.x % 32 * 4, weight);
    norm_and_rotate(v, weight, angles, p.eps, p.qk_scale);
  }

  __device__ void query(float (&v)[4]) const { rotated(text ? p.text_norm_q : p.norm_q, 0, v); }
  __device__ void key(float (&v)[4]) const {
    rotated(text ? p.text_norm_k : p.norm_k, int64_t{p.heads} * kHeadElements, v);
  }
  __device__ void value(float (&v)[4]) const { load_four(row + 2 * int64_t{p.heads} * kHeadElements, v); }
};

// The mean of keys that are spread over the sequence, for a head; sums in a fixed order.
__global__ void __launch_bounds__(kInputThreads) key_mean_kernel(const __grid_constant__ AttentionInputs p) {
  __shared__ float sums[kInputThreads / 32][kHeadElements];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.x, batch = blockIdx.y;
  const int count = min(p.tokens, kSampled);
  float sum[4] = {};
#pragma unroll 4
  for (int i = warp; i < count; i += kInputThreads / 32) {
    float key[4];
    TokenOfHead(p, batch, head, static_cast<int>(int64_t{i} * p.tokens / count), lane).key(key);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[j] += key[j];
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) sums[warp][lane * 4 + j] = sum[j];
  __syncthreads();
  if (threadIdx.x >= kHeadElements) return;
  float total = 0.0f;
  for (const auto& row : sums) total += row[threadIdx.x];
  p.key_mean[(int64_t{batch} * p.heads + head) * kHeadElements + threadIdx.x] = total / count;
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
  const float4 mean = reinterpret_cast<const float4*>(p.key_mean + plane * kHeadElements)[lane];
  for (int t = warp; t < kInputTokens; t += kInputThreads / 32) {
    const int token = blockIdx.x * kInputTokens + t;
    float v[4] = {};
    if (token < p.tokens) {
      const TokenOfHead at(p, batch, head, token, lane);
      float q[4], k[4];
      at.query(q);
      at.key(k);
      at.value(v);
      const int64_t to = (plane * p.tokens + token) * (kHeadElements / 4) + lane;
      reinterpret_cast<uint32_t*>(p.q)[to] = pack_e4m3(q[0], q[1], q[2], q[3]);
      reinterpret_cast<uint32_t*>(p.k)[to] = pack_e4m3(k[0] - mean.x, k[1] - mean.y, k[2] - mean.z, k[3] - mean.w);
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
