// Launches Hopper's 8-bit attention and the pass that prepares its inputs.
#include "attention.cuh"
#include "attention_inputs.cuh"
#include "tensor_map.cuh"

#include <cuda_runtime_api.h>

namespace nibble {
namespace {

template <int kGroups>
Status launch(const Attention& p, cudaStream_t stream) {
  using namespace sm90a;
  using S = AttentionShape<kGroups>;
  const int64_t planes = p.batch * p.heads, padded = (p.tokens + kKeys - 1) / kKeys * kKeys;
  CUtensorMap q, k, v, out;
  const bool made = map_bytes(&q, p.q, kHead, p.tokens, planes, kHead, S::kQueries) &&
                    map_bytes(&k, p.k, kHead, p.tokens, planes, kHead, kKeys) &&
                    map_bytes(&v, p.v, padded, kHead, planes, kKeys, kHead) &&
                    map_bfloat16(&out, p.out, p.heads * kHead, p.tokens, p.batch, 64, 64);
  if (!made) return "the driver refused to describe a tensor of attention to the copy engine";
  const AttentionArgs args{static_cast<int>(p.tokens), static_cast<int>(padded / kKeys), static_cast<int>(p.heads),
                           1.4426950408889634f * p.scale / (p.qk_scale * p.qk_scale), 1.0f / p.v_scale};
  cudaError_t error =
      cudaFuncSetAttribute(attention_kernel<kGroups>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kShared);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const dim3 grid(static_cast<unsigned>((p.tokens + S::kQueries - 1) / S::kQueries), static_cast<unsigned>(planes));
  attention_kernel<kGroups><<<grid, S::kThreads, S::kShared, stream>>>(q, k, v, out, args);
  error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

Status attention_inputs_sm90a(const AttentionInputs& p, void* stream) {
  using namespace sm90a;
  if (!p.tokens || !p.batch) return nullptr;
  key_mean_kernel<<<dim3(p.heads, p.batch), kInputThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  const dim3 grid((p.tokens + kInputTokens - 1) / kInputTokens, p.heads, p.batch);
  attention_inputs_kernel<<<grid, kInputThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

Status attention_sm90a(const Attention& p, void* stream) {
  if (!p.tokens || !p.batch) return nullptr;
  if (!sm90a::encode()) return "this driver has no tensor maps (CUDA 12 or newer is needed)";
  const auto at = static_cast<cudaStream_t>(stream);
  return launch<2>(p, at);
}

}  // namespace nibble
