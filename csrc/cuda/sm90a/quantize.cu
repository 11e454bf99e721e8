// Launches the pass that prepares tokens for Hopper's W4A8 linear.
#include "quantize.cuh"

#include <cuda_runtime_api.h>

namespace nibble {

Status quantize_fp8_sm90a(const QuantizeFp8& p, void* stream) {
  using namespace sm90a;
  if (!p.m) return nullptr;
  int clusters = 1;
  while (clusters < 8 && p.k / clusters > 3200 && p.k / clusters % 64 == 0) clusters *= 2;
  const int64_t slice = p.k / clusters;
  const size_t bytes = kQuantTokens * (slice * 2 + 16) + kPartials * kQuantTokens * kRankChunk * 4;
  if (bytes > 220 * 1024) return "the inputs of a token do not fit into shared memory";
  cudaError_t error =
      cudaFuncSetAttribute(quantize_fp8_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return cudaGetErrorString(error);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(clusters), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((p.m + kQuantTokens - 1) / kQuantTokens * clusters));
  config.blockDim = dim3(kQuantThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  error = cudaLaunchKernelEx(&config, quantize_fp8_kernel, p);
  if (error == cudaSuccess) error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace nibble
