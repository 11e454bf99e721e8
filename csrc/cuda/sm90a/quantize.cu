// Launches the pass that prepares tokens for Hopper's W4A8 linear.
#include "quantize_resident.cuh"
#include "quantize_rows.cuh"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>

namespace nibble {
namespace {

using Kernel = void (*)(QuantizeFp8, int, int);

Kernel choose(const QuantizeFp8& p) {
  using namespace sm90a;
  if (p.targets == 2) return p.scale ? quantize_fp8_kernel<2, true> : quantize_fp8_kernel<2, false>;
  return p.scale ? quantize_fp8_kernel<1, true> : quantize_fp8_kernel<1, false>;
}

Kernel choose_rows(const QuantizeFp8& p) {
  using namespace sm90a;
  if (p.targets == 2) return p.scale ? quantize_rows_kernel<2, true> : quantize_rows_kernel<2, false>;
  return p.scale ? quantize_rows_kernel<1, true> : quantize_rows_kernel<1, false>;
}

constexpr int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// How many tokens a CTA takes where so many can run at once: of the `most` that fit, as few as the last wave allows.
int64_t even_tokens(int64_t m, int64_t most, int64_t places) {
  const int64_t waves = divide_up(m, places * std::max<int64_t>(most, 1));
  return std::min(most, std::max<int64_t>(divide_up(m, places * waves), 8));
}

// Rows that begin 64 bytes apart on the banks: the matrix units' eight rows then meet in none.
int64_t row_pitch(int64_t inputs) {
  return divide_up(inputs * 2, 128) * 128 + 64;
}

// A launch of clusters that use `bytes` of shared memory; the attribute must outlive it.
cudaLaunchConfig_t configure(cudaLaunchAttribute& cluster, int64_t clusters, int size, int64_t threads, int64_t bytes,
                             void* stream) {
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * size));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  return config;
}

// Of the forms whose CTAs end with their tokens.
Status launch(Kernel kernel, const QuantizeFp8& p, int64_t clusters, int size, int64_t threads, int64_t tokens,
              int64_t pitch, int64_t bytes, void* stream) {
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return cudaGetErrorString(error);
  cudaLaunchAttribute cluster{};
  const auto config = configure(cluster, clusters, size, threads, bytes, stream);
  error = cudaLaunchKernelEx(&config, kernel, p, static_cast<int>(tokens), static_cast<int>(pitch));
  if (error == cudaSuccess) error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// CTAs that share a row in the resident form, or 0 where that form does not serve. Two at least: numbers are sent
// through the cluster.
int resident_size(const QuantizeFp8& p) {
  using namespace sm90a;
  if (p.scale || p.targets != 1 || p.target[0].rank > kResidentRanks) return 0;
  for (int size = 2; size <= kMostClusters; size *= 2) {
    if (p.k % (32 * size) == 0 && p.k / size <= kResidentSlice) return size;
  }
  return 0;
}

// How many such clusters the device holds at once, 0 if none; asked once a size, since every launch needs it.
int resident_clusters(int size) {
  using namespace sm90a;
  static std::atomic<int> known[9];
  int clusters = known[size];
  if (clusters) return clusters;
  cudaLaunchAttribute cluster{};
  const auto config = configure(cluster, 1, size, kResidentThreads, kResidentBytes, nullptr);
  if (cudaFuncSetAttribute(quantize_resident_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kResidentBytes) !=
          cudaSuccess ||
      cudaOccupancyMaxActiveClusters(&clusters, quantize_resident_kernel, &config) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  known[size] = clusters;
  return clusters;
}

// `waves`: groups of each cluster.
Status launch_resident(const QuantizeFp8& p, int size, int64_t clusters, int64_t waves, void* stream) {
  using namespace sm90a;
  const int tokens = static_cast<int>(std::max<int64_t>(divide_up(p.m, clusters * waves), 8));
  clusters = std::min(clusters, divide_up(p.m, tokens));
  cudaLaunchAttribute cluster{};
  const auto config = configure(cluster, clusters, size, kResidentThreads, kResidentBytes, stream);
  cudaError_t error =
      cudaFuncSetAttribute(quantize_resident_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kResidentBytes);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, quantize_resident_kernel, p, tokens);
  if (error == cudaSuccess) error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

bool rows_serve(const QuantizeFp8& p) {
  using namespace sm90a;
  const bool ranks_fit = p.target[0].rank <= kRowsRanks && (p.targets == 1 || p.target[1].rank <= kRowsRanks);
  return ranks_fit && p.k % 32 == 0 && p.k <= kRowsInputs;
}

Status launch_rows(const QuantizeFp8& p, int multiprocessors, void* stream) {
  using namespace sm90a;
  constexpr int64_t kRoom = 226 * 1024 - static_cast<int64_t>(sizeof(RowsShared));  // of 227 KB: the rest is padding
  const int64_t pitch = row_pitch(p.k);
  const int64_t most = std::min<int64_t>(kRoom / rows_bytes(1, pitch, p.targets), kRowsTokens),
                tokens = even_tokens(p.m, most, multiprocessors);
  return launch(choose_rows(p), p, divide_up(p.m, tokens), 1, kRowsThreads, tokens, pitch, kRoom, stream);
}

}  // namespace

Status quantize_fp8_sm90a(const QuantizeFp8& p, void* stream) {
  using namespace sm90a;
  if (!p.m) return nullptr;
  int device = 0, multiprocessors = 0, clusters = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (rows_serve(p) && (p.form == kWholeRows || (p.form == kChosen && p.scale)))
    return launch_rows(p, multiprocessors, stream);
  const bool may_stay = p.form == kChosen || p.form == kResident;
  const int size = may_stay ? resident_size(p) : 0, held = size ? resident_clusters(size) : 0;
  if (held) {
    const int64_t waves = divide_up(p.m, int64_t{held} * kResidentTokens);
    if (p.form == kResident || waves > 1) return launch_resident(p, size, held, waves, stream);
  }
  while (!p.scale && clusters < 8 && p.k / clusters > 3200 && p.k / clusters % 64 == 0) clusters *= 2;
  constexpr int64_t kRoom = 228 * 1024 / 2 - 1024 - static_cast<int64_t>(sizeof(QuantShared));  // two CTAs share it
  const int64_t slice = p.k / clusters, pitch = row_pitch(slice);
  const int64_t most = std::min<int64_t>(kRoom / pitch, kQuantTokens),
                tokens = even_tokens(p.m, most, std::max(2 * multiprocessors / clusters, 1));
  if (tokens < 1) return "the inputs of a token do not fit into shared memory";
  const int64_t warps = std::clamp<int64_t>(divide_up(slice, 256), 4, kQuantWarps);
  return launch(choose(p), p, divide_up(p.m, tokens), clusters, warps * 32, tokens, pitch, tokens * pitch, stream);
}

}  // namespace nibble
