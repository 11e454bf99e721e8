// Tokens for the NVFP4 linear of consumer Blackwell: smoothing, e2m1 codes in groups of 16, and the projection onto the
// low-rank branch. Compiled, never run on such a card.
//
// A block takes 16 tokens. Each warp writes the codes of two, a group a lane, then all eight share the projection by
// runs of inputs. Codes and scales are single fp32 operations in the order of kernels.h, so they equal the reference's
// bit for bit. Eight partial sums meet in the order of the warps.
#include "../sm80/common.cuh"

#include <cuda_fp8.h>

namespace nibble {
namespace sm120a {
namespace {

using sm80::multiply_16;
using sm80::to_float;

constexpr int kTokens = 16, kThreads = 256, kWarps = kThreads / 32, kRanks = 32;
constexpr int kGroupFp4 = 16;  // inputs that share a scale
constexpr float kSmallestScale = 0x1p-9f, kLargestScale = 448.0f;
constexpr uint32_t kInfinity = 0x7f800000u, kNanScale = 0x7f;

// Eight values as e2m1, the first in the lowest bits; to nearest even, and to 6 where they are larger.
__device__ inline uint32_t e2m1_of_eight(const float* v) {
  uint32_t word;
  asm("{ .reg .b8 a, b, c, d;\n"
      "cvt.rn.satfinite.e2m1x2.f32 a, %2, %1;\n"
      "cvt.rn.satfinite.e2m1x2.f32 b, %4, %3;\n"
      "cvt.rn.satfinite.e2m1x2.f32 c, %6, %5;\n"
      "cvt.rn.satfinite.e2m1x2.f32 d, %8, %7;\n"
      "mov.b32 %0, {a, b, c, d}; }"
      : "=r"(word)
      : "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "f"(v[4]), "f"(v[5]), "f"(v[6]), "f"(v[7]));
  return word;
}

// A group's smoothed inputs, and the bits of its largest magnitude: they compare as magnitudes do, NaN above infinity.
template <class T>
__device__ inline uint32_t load_group(const T* row, const float* inv_smooth, float (&t)[kGroupFp4]) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kGroupFp4; i += 8) {
    alignas(16) T values[8];
    alignas(16) float by[8];
    *reinterpret_cast<uint4*>(values) = *reinterpret_cast<const uint4*>(row + i);
    reinterpret_cast<float4*>(by)[0] = *reinterpret_cast<const float4*>(inv_smooth + i);
    reinterpret_cast<float4*>(by)[1] = *reinterpret_cast<const float4*>(inv_smooth + i + 4);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      t[i + j] = __fmul_rn(to_float(values[j]), by[j]);
      largest = max(largest, __float_as_uint(t[i + j]) & 0x7fffffffu);
    }
  }
  return largest;
}

// The byte of the scale of what has this largest magnitude, and in `by` what turns a value into its code.
__device__ inline uint8_t scale_of(uint32_t largest, float& by) {
  const float wanted = __fmul_rn(__uint_as_float(largest), 1.0f / 6.0f);
  const __nv_fp8_e4m3 scale(fminf(fmaxf(wanted, kSmallestScale), kLargestScale));
  by = __fdiv_rn(1.0f, static_cast<float>(scale));
  return largest < kInfinity ? scale.__x : kNanScale;
}

template <class T>
__device__ inline void quantize_token(const QuantizeFp4& p, const WeightFp4& w, const T* row, int64_t m, int lane) {
  for (int64_t i = lane * kGroupFp4; i < w.k; i += 32 * kGroupFp4) {
    float t[kGroupFp4], by;
    const uint32_t largest = load_group(row + i, w.inv_smooth + i, t);
    p.scales[m * p.scale_stride + i / kGroupFp4] = scale_of(largest, by);
#pragma unroll
    for (float& value : t) value = __fmul_rn(value, by);
    const bool good = largest < kInfinity;
    const uint2 words = {good ? e2m1_of_eight(t) : 0, good ? e2m1_of_eight(t + 8) : 0};
    *reinterpret_cast<uint2*>(p.codes + (m * w.k + i) / 2) = words;
  }
}

using Partials = float[kWarps][kTokens][kRanks];

// Projects 16 tokens onto 32 ranks, which lie in tiles of 16 ranks by 16 inputs.
template <class T>
__device__ inline void project(const QuantizeFp4& p, const WeightFp4& w, int64_t token, int64_t first_rank,
                               Partials& partial) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, q = lane % 4;
  const auto* x = static_cast<const T*>(p.x);
  const auto* down = reinterpret_cast<const uint4*>(w.down) + lane;
  const int64_t tiles = w.rank / 16;
  float sum[kRanks / 8][4] = {};
  for (int64_t i = warp * 16; i < w.k; i += kWarps * 16) {
    uint32_t a[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t m = token + row + j % 2 * 8;
      a[j] = m < p.m ? *reinterpret_cast<const uint32_t*>(x + m * p.x_stride + i + j / 2 * 8 + q * 2) : 0;
    }
#pragma unroll
    for (int tile = 0; tile < kRanks / 16; ++tile) {
      if (first_rank / 16 + tile >= tiles) break;
      const uint4 b = down[(i / 16 * tiles + first_rank / 16 + tile) * 32];
      multiply_16<T>(sum[tile * 2], a, b.x, b.y);
      multiply_16<T>(sum[tile * 2 + 1], a, b.z, b.w);
    }
  }
#pragma unroll
  for (int tile = 0; tile < kRanks / 8; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) partial[warp][row + i / 2 * 8][tile * 8 + q * 2 + i % 2] = sum[tile][i];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kTokens * kRanks; i += kThreads) {
    const int64_t m = token + i / kRanks, rank = first_rank + i % kRanks;
    float all = 0.0f;
#pragma unroll
    for (int from = 0; from < kWarps; ++from) all += partial[from][i / kRanks][i % kRanks];
    if (m < p.m && rank < w.rank) p.low_rank[m * w.rank + rank] = all;
  }
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(kThreads) quantize_fp4_kernel(const QuantizeFp4 p, const WeightFp4 w) {
  __shared__ Partials partial;
  const int64_t token = int64_t{blockIdx.x} * kTokens;
  for (int t = threadIdx.x / 32; t < kTokens; t += kWarps) {
    const int64_t m = token + t;
    if (m < p.m) quantize_token(p, w, static_cast<const T*>(p.x) + m * p.x_stride, m, threadIdx.x % 32);
  }
  for (int64_t rank = 0; rank < w.rank; rank += kRanks) project<T>(p, w, token, rank, partial);
}

}  // namespace
}  // namespace sm120a

Status quantize_act_sm120a(const QuantizeFp4& p, void* stream) {
  if (!p.m) return nullptr;
  const auto blocks = static_cast<unsigned>((p.m + sm120a::kTokens - 1) / sm120a::kTokens);
  const auto at = static_cast<cudaStream_t>(stream);
  if (p.w->dtype == DType::bf16) {
    sm120a::quantize_fp4_kernel<__nv_bfloat16><<<blocks, sm120a::kThreads, 0, at>>>(p, *p.w);
  } else {
    sm120a::quantize_fp4_kernel<__half><<<blocks, sm120a::kThreads, 0, at>>>(p, *p.w);
  }
  return sm80::launched();
}

}  // namespace nibble
