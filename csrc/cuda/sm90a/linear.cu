// Launches the W4A8 linear of Hopper: tensor maps, tile size, grid.
#include "linear.cuh"
#include "tensor_map.cuh"

#include <cuda_runtime_api.h>

namespace nibble {
namespace {

// A row-major tensor (rows, columns) in boxes of 128 bytes by `box` rows.
bool map_rows(CUtensorMap* map, CUtensorMapDataType type, int bytes, const void* data, int64_t rows, int64_t columns,
              int box) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint32_t boxes[2] = {static_cast<cuuint32_t>(128 / bytes), static_cast<cuuint32_t>(box)};
  return sm90a::make_map(map, type, bytes, data, 2, sizes, boxes);
}

constexpr CUtensorMapDataType sixteen_bits(DType dtype) {
  return dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
}

int multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

template <int kTokens>
Status launch(const LinearFp8& p, int clusters, cudaStream_t stream) {
  using namespace sm90a;
  using S = Shape<kTokens>;
  const int64_t panels = p.n / kRows, pairs = (panels + 3) / 4, token_tiles = (p.m + kTokens - 1) / kTokens;
  const bool boxed = p.y_dtype != DType::fp32 && p.n_valid % 8 == 0;
  CUtensorMap act, low_rank{}, out{};
  bool made = map_rows(&act, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, p.act, p.m, p.k_valid, kTokens / 2);
  if (p.rank) made &= map_rows(&low_rank, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, p.low_rank, p.m, p.rank, kTokens / 2);
  if (boxed) made &= map_rows(&out, sixteen_bits(p.y_dtype), 2, p.y, p.m, p.n_valid, kTokens);
  if (!made) return "the driver refused to describe a tensor to the copy engine";
  const Args args{p.codes,
                  p.wscales,
                  p.up,
                  p.bias,
                  p.act_scale,
                  p.y,
                  static_cast<int>(p.m),
                  static_cast<int>(p.n_valid),
                  static_cast<int>(panels),
                  static_cast<int>(p.k / kInputs),
                  static_cast<int>(p.rank),
                  static_cast<int>(token_tiles),
                  static_cast<int>(token_tiles * pairs),
                  p.scale_dtype,
                  p.y_dtype,
                  boxed,
                  p.gelu};
  cudaError_t error =
      cudaFuncSetAttribute(linear_fp8_kernel<kTokens>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kShared);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const int grid = 2 * (args.tiles < clusters ? args.tiles : clusters);
  linear_fp8_kernel<kTokens><<<grid, kThreads, S::kShared, stream>>>(act, low_rank, out, args);
  error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Rounds of tiles, in tokens: what the slowest cluster does. The constant stands for a tile's start and end.
int64_t rounds(const LinearFp8& p, int tokens, int clusters) {
  const int64_t tiles = (p.m + tokens - 1) / tokens * ((p.n / sm90a::kRows + 3) / 4);
  return (tiles + clusters - 1) / clusters * (tokens + 24);
}

}  // namespace

Status linear_fp8_sm90a(const LinearFp8& p, void* stream) {
  if (p.m == 0) return nullptr;
  if (!sm90a::encode()) return "this driver has no tensor maps (CUDA 12 or newer is needed)";
  const int clusters = multiprocessors() / 2;
  const auto at = static_cast<cudaStream_t>(stream);
  int tokens = p.tile ? static_cast<int>(p.tile) : 64;
  if (!p.tile) {
    for (const int wider : {128, 176}) {
      if (rounds(p, wider, clusters) <= rounds(p, tokens, clusters)) tokens = wider;
    }
  }
  if (tokens == 64) return launch<64>(p, clusters, at);
  if (tokens == 128) return launch<128>(p, clusters, at);
  return launch<176>(p, clusters, at);
}

}  // namespace nibble
