// Launches the pass that prepares tokens for Hopper's W4A8 linear.
#include "quantize.cuh"

#include <cuda_runtime_api.h>

#include <algorithm>

namespace nibble {
namespace {

using Kernel = void (*)(QuantizeFp8, int, int);

Kernel choose(const QuantizeFp8& p) {
  using namespace sm90a;
  if (p.targets == 2) return p.scale ? quantize_fp8_kernel<2, true> : quantize_fp8_kernel<2, false>;
  return p.scale ? quantize_fp8_kernel<1, true> : quantize_fp8_kernel<1, false>;
}

constexpr int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// How many tokens a CTA takes: of those that fit (two CTAs a multiprocessor), as few as the last wave allows.
int64_t even_tokens(int64_t m, int64_t pitch, int clusters, int multiprocessors) {
  constexpr int64_t kRoom = 228 * 1024 / 2 - 1024 - static_cast<int64_t>(sizeof(sm90a::QuantShared));
  const int64_t most = std::min<int64_t>(kRoom / pitch, sm90a::kQuantTokens);
  const int64_t places = std::max(2 * multiprocessors / clusters, 1),
                waves = divide_up(m, places * std::max<int64_t>(most, 1));
  return std::min(most, std::max<int64_t>(divide_up(m, places * waves), 8));
}

}  // namespace

Status quantize_fp8_sm90a(const QuantizeFp8& p, void* stream) {
  using namespace sm90a;
  if (!p.m) return nullptr;
  int device = 0, multiprocessors = 0, clusters = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  while (!p.scale && clusters < 8 && p.k / clusters > 3200 && p.k / clusters % 64 == 0) clusters *= 2;
  const int64_t slice = p.k / clusters;
  // Rows that begin 64 bytes apart on the banks: the matrix units' eight rows then meet in none.
  const int64_t pitch = divide_up(slice * 2, 128) * 128 + 64;
  const int64_t tokens = even_tokens(p.m, pitch, clusters, multiprocessors);
  if (tokens < 1) return "the inputs of a token do not fit into shared memory";
  const int64_t bytes = tokens * pitch, warps = std::clamp<int64_t>(divide_up(slice, 256), 4, kQuantWarps);
  const Kernel kernel = choose(p);
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return cudaGetErrorString(error);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(clusters), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(divide_up(p.m, tokens) * clusters));
  config.blockDim = dim3(static_cast<unsigned>(warps * 32));
  config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  error = cudaLaunchKernelEx(&config, kernel, p, static_cast<int>(tokens), static_cast<int>(pitch));
  if (error == cudaSuccess) error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace nibble
