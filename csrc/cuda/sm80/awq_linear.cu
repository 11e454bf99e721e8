// The weight-only linear (W4A16) for few tokens: bound by reading the weights, which are widened on the way.
//
// A block takes a panel of 16 outputs, its warps groups of 64 inputs in turns: 512 bytes of codes, 16 a lane, which are
// four outputs of eight inputs. The lanes' and warps' sums meet in a fixed order. More than eight tokens take more
// blocks, which read the weights again.
#include "common.cuh"

namespace nibble {
namespace sm80 {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * 32;

// 0..15 as a float: the code becomes the last bits of 2^23's mantissa, which is four times as fast as a conversion.
__device__ inline float code_at(uint32_t word, int shift) {
  return __uint_as_float((word >> shift & 15) | 0x4b000000u) - 8388608.0f;
}

// The 16-bit values of four neighbouring outputs.
__device__ inline void widen_four(const uint16_t* from, DType dtype, float (&to)[4]) {
  const uint2 raw = *reinterpret_cast<const uint2*>(from);
  const uint32_t words[2] = {raw.x, raw.y};
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = widen(static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16)), dtype);
}

// Sums over the eight lanes that hold the same outputs (lane % 4).
__device__ inline float over_lanes(float sum) {
#pragma unroll
  for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  return sum;
}

template <int kTokens>
__global__ void __launch_bounds__(kThreads) awq_linear_kernel(const AwqLinear p) {
  __shared__ float partial[kTokens][kWarps][kPanel];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, outputs = lane % 4 * 4;
  const int64_t panel = blockIdx.x, first = int64_t{blockIdx.y} * kTokens, groups = p.k / kGroup;
  const auto* codes = reinterpret_cast<const uint4*>(p.codes) + panel * groups * 32 + lane;
  float sum[kTokens][4] = {};
#pragma unroll 2
  for (int64_t group = warp; group < groups; group += kWarps) {
    const uint4 raw = codes[group * 32];
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
    float scale[4], zero[4];
    widen_four(p.scales + (panel * groups + group) * kPanel + outputs, p.scale_dtype, scale);
    widen_four(p.zeros + (panel * groups + group) * kPanel + outputs, p.scale_dtype, zero);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const int64_t m = min(first + t, p.m - 1);
      const auto* x = reinterpret_cast<const float4*>(p.x + m * p.x_stride + group * kGroup + lane / 4 * 8);
      const float4 a = x[0], b = x[1];
      const float v[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
      for (int o = 0; o < 4; ++o) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {  // low nibbles are inputs 0..3, high nibbles 4..7
          sum[t][o] = fmaf(fmaf(code_at(words[o], j % 4 * 8 + j / 4 * 4), scale[o], zero[o]), v[j], sum[t][o]);
        }
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
#pragma unroll
    for (int o = 0; o < 4; ++o) {
      const float all = over_lanes(sum[t][o]);
      if (lane < 4) partial[t][warp][outputs + o] = all;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kTokens * kPanel; i += kThreads) {
    const int64_t m = first + i / kPanel, n = panel * kPanel + i % kPanel;
    float all = 0.0f;
#pragma unroll
    for (int from = 0; from < kWarps; ++from) all += partial[i / kPanel][from][i % kPanel];
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
