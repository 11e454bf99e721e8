// What attention reads, from the projections of a joint sequence: queries and keys after RMS norm and rotation.
//
// A warp takes a token; its lanes hold eight elements each of two heads at a time, and the token's angles for all
// heads.
#include "../kernels.h"

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

namespace nibble {
namespace {

constexpr int kHead = 128, kLanes = kHead / 8, kWarps = 8, kParts = 3;

struct Eight {
  float at[8];

  __device__ Eight() = default;
  __device__ explicit Eight(const uint4& raw) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      at[2 * i] = __uint_as_float(words[i] << 16);
      at[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
  __device__ explicit Eight(const float* from) {
    const auto* four = reinterpret_cast<const float4*>(from);
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

__device__ inline const uint4* vector_at(const void* base, int64_t element) {
  return reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(base) + element);
}

// x / rms(x) * weight, rounded as torch does between the two, then each pair of elements turned by the token's angle.
__device__ inline uint4 norm_and_rotate(const uint4& raw, const Eight& weight, const Eight& cosine, const Eight& sine,
                                        float eps) {
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
    turned.at[i] = v.at[i] * cosine.at[i] - v.at[i + 1] * sine.at[i];
    turned.at[i + 1] = v.at[i + 1] * cosine.at[i + 1] + v.at[i] * sine.at[i + 1];
  }
  return turned.rounded();
}

__global__ void __launch_bounds__(kWarps * 32) rotate_heads_kernel(const __grid_constant__ RotateHeads p) {
  const int64_t index = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (index >= int64_t{p.batch} * p.tokens) return;
  const int lane = threadIdx.x % 32, token = static_cast<int>(index % p.tokens), element = lane % kLanes * 8;
  const int64_t batch = index / p.tokens, width = int64_t{p.heads} * kHead;
  const bool text = token < p.text_tokens;
  const int64_t row = text ? (batch * p.text_tokens + token) * p.text_stride
                           : (batch * (p.tokens - p.text_tokens) + token - p.text_tokens) * p.picture_stride;
  const void* from = text ? p.text : p.picture;
  const Eight weight_q(*vector_at(text ? p.text_norm_q : p.norm_q, element));
  const Eight weight_k(*vector_at(text ? p.text_norm_k : p.norm_k, element));
  const Eight cosine(p.cosine + int64_t{token} * kHead + element), sine(p.sine + int64_t{token} * kHead + element);
  auto* q = static_cast<__nv_bfloat16*>(p.q) + index * width;
  auto* k = static_cast<__nv_bfloat16*>(p.k) + index * width;
#pragma unroll 2
  for (int pair = static_cast<int>(blockIdx.y) * 2; pair < p.heads; pair += 2 * kParts) {
    const int head = pair + lane / kLanes;
    const bool real = head < p.heads;
    const int64_t at = int64_t{head} * kHead + element;
    const uint4 raw_q = real ? *vector_at(from, row + at) : uint4{};
    const uint4 raw_k = real ? *vector_at(from, row + width + at) : uint4{};
    const uint4 out_q = norm_and_rotate(raw_q, weight_q, cosine, sine, p.eps);
    const uint4 out_k = norm_and_rotate(raw_k, weight_k, cosine, sine, p.eps);
    if (!real) continue;
    *reinterpret_cast<uint4*>(q + at) = out_q;
    *reinterpret_cast<uint4*>(k + at) = out_k;
    if (p.v) {
      auto* v = static_cast<__nv_bfloat16*>(p.v) + index * width;
      *reinterpret_cast<uint4*>(v + at) = *vector_at(from, row + 2 * width + at);
    }
  }
}

}  // namespace

Status rotate_heads_sm80(const RotateHeads& p, void* stream) {
  const int64_t rows = int64_t{p.batch} * p.tokens;
  if (!rows) return nullptr;
  const dim3 blocks(static_cast<unsigned>((rows + kWarps - 1) / kWarps), kParts);
  rotate_heads_kernel<<<blocks, kWarps * 32, 0, static_cast<cudaStream_t>(stream)>>>(p);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace nibble
