// The weight-only linear (W4A16) for few tokens: bound by reading the weights, which are widened on the way.
//
// A block takes a panel of 16 outputs; eight threads an output share its inputs, eight at a time, and their sums meet
// in a fixed order. More than eight tokens take more blocks, which read the weights again.
#include "common.cuh"

namespace nibble {
namespace sm80 {
namespace {

constexpr int kSplits = 8, kThreads = kSplits * kPanel;

template <int kTokens>
__global__ void __launch_bounds__(kThreads) awq_linear_kernel(const AwqLinear p) {
  __shared__ float partial[kTokens][kSplits][kPanel];
  const int output = threadIdx.x % kPanel, split = threadIdx.x / kPanel;
  const int64_t panel = blockIdx.x, first = int64_t{blockIdx.y} * kTokens, blocks = p.k / 8, groups = p.k / kGroup;
  const auto* codes = reinterpret_cast<const uint32_t*>(p.codes) + panel * blocks * kPanel + output;
  float sum[kTokens] = {};
#pragma unroll 4
  for (int64_t block = split; block < blocks; block += kSplits) {
    const uint32_t word = codes[block * kPanel];
    const int64_t group = (panel * groups + block / 8) * kPanel + output;
    const float scale = widen(p.scales[group], p.scale_dtype), zero = widen(p.zeros[group], p.scale_dtype);
    float weight[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {  // low nibbles are inputs 0..3, high nibbles 4..7
      weight[j] = fmaf(static_cast<float>(word >> (j % 4 * 8 + j / 4 * 4) & 15), scale, zero);
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const int64_t m = min(first + t, p.m - 1);
      const auto* x = reinterpret_cast<const float4*>(p.x + m * p.x_stride + block * 8);
      const float4 a = x[0], b = x[1];
      const float v[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[t] = fmaf(weight[j], v[j], sum[t]);
    }
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) partial[t][split][output] = sum[t];
  __syncthreads();
  for (int i = threadIdx.x; i < kTokens * kPanel; i += kThreads) {
    const int64_t m = first + i / kPanel, n = panel * kPanel + i % kPanel;
    float all = 0.0f;
#pragma unroll
    for (int from = 0; from < kSplits; ++from) all += partial[i / kPanel][from][i % kPanel];
    if (m < p.m && n < p.n) store(p.y, p.y_dtype, m * p.n + n, all + p.bias[n]);
  }
}

template <int kTokens>
Status launch_awq(const AwqLinear& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((p.n + kPanel - 1) / kPanel),
                  static_cast<unsigned>((p.m + kTokens - 1) / kTokens));
  if (grid.y > 65535) return "more than half a million tokens in one call of a weight-only linear";
  awq_linear_kernel<kTokens><<<grid, kThreads, 0, stream>>>(p);
  return launched();
}

}  // namespace
}  // namespace sm80

Status awq_linear_sm80(const AwqLinear& p, void* stream) {
  if (!p.m) return nullptr;
  const auto at = static_cast<cudaStream_t>(stream);
  if (p.m == 1) return sm80::launch_awq<1>(p, at);
  if (p.m <= 4) return sm80::launch_awq<4>(p, at);
  return sm80::launch_awq<8>(p, at);
}

}  // namespace nibble
