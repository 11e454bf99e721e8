// Tokens for the linear of Ampere and later: smoothing, integer codes, and the projection onto the low-rank branch.
//
// A block takes 16 tokens. Each warp writes the codes of two, then all eight share the projection by runs of inputs;
// the tokens come from device memory once, and from the cache when they are read again. Codes are single fp32
// operations in the order of ops.h, so they equal the CPU's bit for bit. Eight partial sums meet in the order of the
// warps.
#include "common.cuh"

namespace nibble {
namespace sm80 {
namespace {

constexpr int kTokens = 16, kThreads = 256, kWarps = kThreads / 32, kRanks = 32;
constexpr uint32_t kAllLanes = 0xffffffffu, kInfinity = 0x7f800000u;

template <class T>
__device__ inline void load_eight(const T* from, float (&v)[8]) {
  alignas(16) T values[8];
  constexpr int kVectors = sizeof(values) / 16;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) reinterpret_cast<uint4*>(values)[i] = reinterpret_cast<const uint4*>(from)[i];
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = to_float(values[i]);
}

// Eight smoothed inputs of a token.
template <class T>
__device__ inline void smoothed(const QuantizeAct& p, const Weight& w, const T* row, int64_t i, float (&t)[8]) {
  float by[8];
  load_eight(row + i, t);
  load_eight(w.inv_smooth + i, by);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (p.mode == ActMode::uint4) t[j] = __fadd_rn(t[j], kUnsignedShift);
    t[j] = __fmul_rn(t[j], by[j]);
  }
}

// Magnitudes compare as their bits do, and NaN lies above infinity: a bad number is never lost.
__device__ inline uint32_t largest_of(const float (&t)[8]) {
  uint32_t largest = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) largest = max(largest, __float_as_uint(t[j]) & 0x7fffffffu);
  return largest;
}

struct Range4 {
  float levels, unit;  // unit: 1 / levels
  int lowest;
};

__device__ inline Range4 range_of(ActMode mode) {
  if (mode == ActMode::int8) return {127.0f, 1.0f / 127.0f, -127};
  if (mode == ActMode::int4) return {7.0f, 1.0f / 7.0f, -8};
  return {15.0f, 1.0f / 15.0f, 0};
}

// The scale of what has this largest magnitude, and in `by` what turns a value into its code.
__device__ inline float scale_of(uint32_t bits, const Range4& range, float& by) {
  const float largest = __uint_as_float(bits);
  by = bits < kInfinity && largest >= kTinyMax ? __fdiv_rn(range.levels, largest) : 0.0f;
  return largest < kTinyMax ? 0.0f : __fmul_rn(largest, range.unit);
}

// Eight codes from `at` on: as bytes, or as a word whose low nibbles are the first four and whose high ones the others.
__device__ inline void write_codes(int8_t* to, int64_t at, bool pairs, const float (&t)[8], float by,
                                   const Range4& range) {
  uint32_t words[2] = {};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int code = __float2int_rn(__fmul_rn(t[j], by));  // NaN gives 0
    words[j / 4] |= (max(range.lowest, min(code, static_cast<int>(range.levels))) & 0xff) << j % 4 * 8;
  }
  if (pairs) {
    *reinterpret_cast<uint32_t*>(to + at / 2) = (words[0] & 0x0f0f0f0fu) | (words[1] & 0x0f0f0f0fu) << 4;
  } else {
    *reinterpret_cast<uint2*>(to + at) = {words[0], words[1]};
  }
}

template <class T>
__device__ inline void quantize_token(const QuantizeAct& p, const Weight& w, bool pairs, const T* row, int64_t m,
                                      int lane) {
  const Range4 range = range_of(p.mode);
  float t[8], by = 0.0f;
  uint32_t largest = 0;
  if (p.mode == ActMode::int8) {
    for (int64_t i = lane * 8; i < w.k; i += 256) {
      smoothed(p, w, row, i, t);
      largest = max(largest, largest_of(t));
    }
    largest = __reduce_max_sync(kAllLanes, largest);
    const float scale = scale_of(largest, range, by);
    if (lane == 0) p.scales[m] = scale;
  }
  for (int64_t base = 0; base < w.k; base += 256) {  // no lane leaves early: they ask each other
    const int64_t i = base + lane * 8;
    const bool real = i < w.k;
    if (real) smoothed(p, w, row, i, t);
    if (p.mode != ActMode::int8) {
      largest = real ? largest_of(t) : 0;
#pragma unroll
      for (int step = 1; step < 8; step *= 2) largest = max(largest, __shfl_xor_sync(kAllLanes, largest, step));
      const float scale = scale_of(largest, range, by);
      if (real && lane % 8 == 0) p.scales[m * (w.k / kGroup) + i / kGroup] = scale;
    }
    if (real) write_codes(p.codes, m * w.k + i, pairs, t, by, range);
  }
}

using Partials = float[kWarps][kTokens][kRanks];

// Projects 16 tokens onto 32 ranks; x and `down` have one 16-bit type, T.
template <class T>
__device__ inline void project(const QuantizeAct& p, const Weight& w, int64_t token, int64_t first_rank,
                               Partials& partial) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, q = lane % 4;
  const auto* x = static_cast<const T*>(p.x);
  const auto* down = reinterpret_cast<const uint32_t*>(w.down);  // pairs of inputs, ranks side by side
  float sum[kRanks / 8][4] = {};
  for (int64_t i = warp * 16; i < w.k; i += kWarps * 16) {
    uint32_t a[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t m = token + row + j % 2 * 8;
      a[j] = m < p.m ? *reinterpret_cast<const uint32_t*>(x + m * p.x_stride + i + j / 2 * 8 + q * 2) : 0;
    }
#pragma unroll
    for (int tile = 0; tile < kRanks / 8; ++tile) {
      const int64_t rank = first_rank + tile * 8 + row;
      if (first_rank + tile * 8 >= w.rank) break;  // ranks come in sixteens
      multiply_16<T>(sum[tile], a, down[(i / 2 + q) * w.rank + rank], down[(i / 2 + 4 + q) * w.rank + rank]);
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

// The same for any pair of types, an element a thread: for fp32 tokens, which lose nothing here.
template <class T>
__device__ inline void project_plainly(const QuantizeAct& p, const Weight& w, int64_t token) {
  const auto* down = reinterpret_cast<const uint32_t*>(w.down);
  for (int64_t i = threadIdx.x; i < kTokens * w.rank; i += kThreads) {
    const int64_t m = token + i / w.rank, rank = i % w.rank;
    if (m >= p.m) break;
    const T* row = static_cast<const T*>(p.x) + m * p.x_stride;
    float sum[4] = {};
    for (int64_t pair = 0; pair < w.k / 2; pair += 4) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 by = widen_two(down[(pair + j) * w.rank + rank], w.low_rank_dtype);
        sum[j] = fmaf(to_float(row[2 * (pair + j)]), by.x, sum[j]);
        sum[j] = fmaf(to_float(row[2 * (pair + j) + 1]), by.y, sum[j]);
      }
    }
    p.low_rank[m * w.rank + rank] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
}

template <class T, bool kSameType>
__global__ void __launch_bounds__(kThreads) quantize_act_kernel(const QuantizeAct p, const Weight w, bool pairs) {
  const int64_t token = int64_t{blockIdx.x} * kTokens;
  for (int t = threadIdx.x / 32; t < kTokens; t += kWarps) {
    const int64_t m = token + t;
    if (m < p.m) quantize_token(p, w, pairs, static_cast<const T*>(p.x) + m * p.x_stride, m, threadIdx.x % 32);
  }
  if constexpr (kSameType) {
    __shared__ Partials partial;
    for (int64_t rank = 0; rank < w.rank; rank += kRanks) project<T>(p, w, token, rank, partial);
  } else {
    project_plainly<T>(p, w, token);
  }
}

template <class T>
void launch(const QuantizeAct& p, bool pairs, const Weight& w, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((p.m + kTokens - 1) / kTokens);
  if constexpr (sizeof(T) == 2) {
    if (p.x_dtype == w.low_rank_dtype) {
      quantize_act_kernel<T, true><<<blocks, kThreads, 0, stream>>>(p, w, pairs);
      return;
    }
  }
  quantize_act_kernel<T, false><<<blocks, kThreads, 0, stream>>>(p, w, pairs);
}

}  // namespace
}  // namespace sm80

Status quantize_act_sm80(const QuantizeAct& p, bool pairs, void* stream) {
  if (!p.m) return nullptr;
  const auto at = static_cast<cudaStream_t>(stream);
  if (p.x_dtype == DType::bf16) {
    sm80::launch<__nv_bfloat16>(p, pairs, *p.w, at);
  } else if (p.x_dtype == DType::fp16) {
    sm80::launch<__half>(p, pairs, *p.w, at);
  } else {
    sm80::launch<float>(p, pairs, *p.w, at);
  }
  return sm80::launched();
}

}  // namespace nibble
