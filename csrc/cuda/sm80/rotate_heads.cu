// What attention reads, from the projections of a joint sequence: queries and keys after RMS norm and rotation.
//
// A warp takes a token; its lanes hold eight elements each of two heads at a time, and the token's angles for all
// heads.
#include "../common/heads.cuh"
#include "../kernels.h"

#include <cuda_runtime_api.h>

namespace nibble {
namespace {

constexpr int kWarps = 8, kParts = 3;

__device__ inline const uint4* vector_at(const void* base, int64_t element) {
  return reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(base) + element);
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
  const uint4 angles = angles_at(p.angles, token, lane % kLanes);
  auto* q = static_cast<__nv_bfloat16*>(p.q) + index * width;
  auto* k = static_cast<__nv_bfloat16*>(p.k) + index * width;
#pragma unroll 2
  for (int pair = static_cast<int>(blockIdx.y) * 2; pair < p.heads; pair += 2 * kParts) {
    const int head = pair + lane / kLanes;
    const bool real = head < p.heads;
    const int64_t at = int64_t{head} * kHead + element;
    const uint4 raw_q = real ? *vector_at(from, row + at) : uint4{};
    const uint4 raw_k = real ? *vector_at(from, row + width + at) : uint4{};
    const uint4 out_q = norm_and_rotate(raw_q, weight_q, angles, p.eps);
    const uint4 out_k = norm_and_rotate(raw_k, weight_k, angles, p.eps);
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
