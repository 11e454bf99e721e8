// Launches Hopper's attention with 8-bit probabilities and values, and the pass that prepares the values.
#include "attention.cuh"
#include "attention_values.cuh"
#include "tensor_map.cuh"

#include <cuda_runtime_api.h>

namespace nibble {
namespace {

// Heads side by side in a row, in boxes of 64 elements by `rows`.
bool map_heads(CUtensorMap* map, const HeadsView& of, const Attention& p, int rows) {
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(p.heads * sm90a::kHead), static_cast<cuuint64_t>(p.tokens),
                               static_cast<cuuint64_t>(p.batch)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(of.token_stride * 2),
                                 static_cast<cuuint64_t>(of.batch_stride * 2)};
  const cuuint32_t boxes[3] = {sm90a::kHalf, static_cast<cuuint32_t>(rows), 1};
  return sm90a::make_map(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, of.data, 3, sizes, strides, boxes);
}

template <int kGroups>
Status launch(const Attention& p, int64_t padded, cudaStream_t stream) {
  using namespace sm90a;
  using S = AttentionShape<kGroups>;
  const int64_t planes = p.batch * p.heads;
  CUtensorMap q, k, v, out;
  const bool made = map_heads(&q, p.q, p, 64) && map_heads(&k, p.k, p, kKeys) &&
                    map_bytes(&v, p.values, padded, kHead, planes, kKeys, kHead) &&
                    map_bfloat16(&out, p.out, p.heads * kHead, p.tokens, p.batch, kHalf, 64);
  if (!made) return "the driver refused to describe a tensor of attention to the copy engine";
  const AttentionArgs args{static_cast<int>(p.tokens), static_cast<int>(padded / kKeys), static_cast<int>(p.heads),
                           1.4426950408889634f * p.scale, 1.0f / p.v_scale};
  cudaError_t error =
      cudaFuncSetAttribute(attention_kernel<kGroups>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kShared);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const dim3 grid(static_cast<unsigned>((p.tokens + S::kQueries - 1) / S::kQueries), static_cast<unsigned>(planes));
  attention_kernel<kGroups><<<grid, S::kThreads, S::kShared, stream>>>(q, k, v, out, args);
  error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

Status attention_sm90a(const Attention& p, void* stream) {
  using namespace sm90a;
  if (!p.tokens || !p.batch) return nullptr;
  if (!encode()) return "this driver has no tensor maps (CUDA 12 or newer is needed)";
  const auto at = static_cast<cudaStream_t>(stream);
  const int64_t blocks = (p.tokens + kValueTokens - 1) / kValueTokens, padded = blocks * kValueTokens;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(p.heads), static_cast<unsigned>(p.batch));
  attention_values_kernel<<<grid, kValueThreads, 0, at>>>(p, static_cast<int>(padded));
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? launch<2>(p, padded, at) : cudaGetErrorString(error);
}

}  // namespace nibble
