// Launches the W4A8 linear of Hopper: tensor maps, tile size, grid.
#include "linear_wide.cuh"
#include "tensor_map.cuh"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <initializer_list>

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

// The divided up-projection (divide.cuh), behind the weights in `wide`.
const uint8_t* beside_wide(const uint8_t* wide, int64_t n, int64_t k) {
  return wide ? wide + n * k : nullptr;
}

using Kernel = void (*)(CUtensorMap, CUtensorMap, CUtensorMap, sm90a::Args);

// Whether all tokens of a tile have the same gates.
bool fits(const LinearFp8& p, int tokens) {
  return !p.gate || p.m <= p.tokens_per_sample || p.tokens_per_sample % tokens == 0;
}

// `out_tokens`: how many of a tile's tokens are written at once.
Status launch(Kernel kernel, const LinearFp8& p, int tokens, int out_tokens, int shared, int clusters,
              cudaStream_t stream) {
  using namespace sm90a;
  const int64_t panels = p.n / kRows, pairs = (panels + 3) / 4, token_tiles = (p.m + tokens - 1) / tokens;
  const bool boxed = p.y_dtype != DType::fp32 && p.n_valid % 8 == 0;
  if (p.gate && !(boxed && p.y_dtype == DType::bf16)) return "only whole boxes of bfloat16 can be added to";
  if (p.heads && !(boxed && p.y_dtype == DType::bf16 && p.n_valid == 3 * kHead * p.heads)) {
    return "heads are 128 wide, in bfloat16";
  }
  if (!fits(p, tokens)) return "a tile of tokens would have the gates of two samples";
  CUtensorMap act, low_rank{}, out{};
  bool made = map_rows(&act, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, p.act, p.m, p.k_valid, tokens / 2);
  if (p.rank) {
    made &= map_rows(&low_rank, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, p.low_rank, p.m, p.rank, tokens / 2);
  }
  if (boxed) made &= map_rows(&out, sixteen_bits(p.y_dtype), 2, p.y, p.m, p.n_valid, out_tokens);
  if (!made) return "the driver refused to describe a tensor to the copy engine";
  const Args args{p.codes,
                  p.wscales,
                  p.up,
                  p.bias,
                  p.act_scale,
                  p.wide,
                  beside_wide(p.wide, p.n, p.k),
                  p.row_most,
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
                  p.gelu,
                  p.gate,
                  p.gate_stride,
                  static_cast<int>(p.tokens_per_sample),
                  p.angles,
                  p.norm_q,
                  p.norm_k,
                  p.eps,
                  p.heads,
                  p.first_position};
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  // The product's CTAs come while the last blocks of the kernel before run, the widening as a rule, and wait for its
  // end.
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(2 * (args.tiles < clusters ? args.tiles : clusters)));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = p.wide ? 1 : 0;
  error = cudaLaunchKernelEx(&config, kernel, act, low_rank, out, args);
  if (error == cudaSuccess) error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <int kTokens>
Status narrow(const LinearFp8& p, int clusters, cudaStream_t stream) {
  using namespace sm90a;
  return launch(linear_fp8_kernel<kTokens>, p, kTokens, kTokens, Shape<kTokens>::kShared, clusters, stream);
}

template <int kTokens>
Status wide(const LinearFp8& p, int clusters, cudaStream_t stream) {
  using namespace sm90a;
  using S = WideShape<kTokens>;
  return launch(linear_wide_kernel<kTokens>, p, kTokens, S::kOut, S::kShared, clusters, stream);
}

// Rounds of tiles, in tokens: what the slowest cluster does. The constant stands for a tile's start and end.
int64_t rounds(const LinearFp8& p, int tokens, int clusters) {
  const int64_t tiles = (p.m + tokens - 1) / tokens * ((p.n / sm90a::kRows + 3) / 4);
  return (tiles + clusters - 1) / clusters * (tokens + 24);
}

}  // namespace

Status widen_fp8_sm90a(const WidenFp8& p, void* stream) {
  using namespace sm90a;
  const int panels = static_cast<int>(p.n / kRows), steps = static_cast<int>(p.k / kInputs);
  const int splits = std::min(steps, (8 * multiprocessors() + panels - 1) / panels);
  const int each = (steps + splits - 1) / splits;
  const dim3 grid(panels, (steps + each - 1) / each + (p.rank ? 1 : 0));
  const auto kernel = p.nvfp4 ? widen_kernel<true> : widen_kernel<false>;
  auto* up_out = reinterpret_cast<uint16_t*>(p.wide + p.n * p.k);
  const Divide divide{p.up, p.row_scale, up_out, static_cast<int>(p.rank)};
  kernel<<<grid, 128, 0, static_cast<cudaStream_t>(stream)>>>(
      {p.codes, p.wscales, p.row_most, p.wide, steps, each, p.scale_dtype, divide});
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

Status linear_fp8_sm90a(const LinearFp8& p, void* stream) {
  if (p.m == 0) return nullptr;
  if (!sm90a::encode()) return "this driver has no tensor maps (CUDA 12 or newer is needed)";
  const int clusters = multiprocessors() / 2;
  const auto at = static_cast<cudaStream_t>(stream);
  const auto chosen = [&](std::initializer_list<int> widths) {
    if (p.tile) return p.tile;
    int best = *widths.begin();
    for (const int width : widths) {
      if (fits(p, width) && rounds(p, width, clusters) <= rounds(p, best, clusters)) best = width;
    }
    return best;
  };
  if (p.wide) {
    const int tokens = chosen({128, 192, 224, 256});
    return tokens == 128   ? wide<128>(p, clusters, at)
           : tokens == 192 ? wide<192>(p, clusters, at)
           : tokens == 224 ? wide<224>(p, clusters, at)
                           : wide<256>(p, clusters, at);
  }
  const int tokens = chosen({64, 128, 176});
  return tokens == 64    ? narrow<64>(p, clusters, at)
         : tokens == 128 ? narrow<128>(p, clusters, at)
                         : narrow<176>(p, clusters, at);
}

}  // namespace nibble
