// The low-rank branch in the units of a widened product: with up-projection and token projections divided by the scales
// of output and token, its terms go to the same sums as the product's, and one scaling at the end serves both.
//
// Out: up [panel][rank / 64][64][64], swizzled as the weights are, and low_rank (M,R), both bf16.
#pragma once
#include "linear.cuh"

namespace nibble::sm90a {

constexpr int kWideBytes = kRows * kInputs;  // of a stage's weights, or of 64 ranks of `up`
constexpr float kLargest = 32;               // what a code of 1 becomes in the group with its row's largest scale

struct Divide {
  const uint16_t *up, *low_rank;
  const float *row_most, *act_scale;
  uint16_t *up_out, *low_rank_out;
  int m, rank;
};

// A row whose scale is zero has codes of zero: 1 does as well there, and can be divided by.
__device__ inline float row_divisor(const float* row_most, int n) {
  const float scale = row_most[n] / kLargest;
  return scale == 0.0f ? 1.0f : scale;
}

// A token whose scale is zero counts as zero, in this branch too.
__device__ inline uint4 divide_eight(const uint16_t* from, float by) {
  const uint4 raw = *reinterpret_cast<const uint4*>(from);
  const auto divided = [&](uint32_t bits) { return by == 0.0f ? 0.0f : __uint_as_float(bits) / by; };
  const auto two = [&](uint32_t word) { return pack_two(divided(word << 16), divided(word & 0xffff0000u)); };
  return {two(raw.x), two(raw.y), two(raw.z), two(raw.w)};
}

// A block's part: 64 rows of `up`, and the projections of some tokens. 128 threads.
__device__ inline void divide(const Divide& p, int panel) {
  const int chunks = (p.rank + kRanks - 1) / kRanks;
  for (int i = threadIdx.x; i < chunks * kRows * 8; i += 128) {
    const int chunk = i / (kRows * 8), row = i / 8 % kRows, column = i % 8, rank = chunk * kRanks + column * 8;
    uint4 value{};
    if (rank < p.rank) {
      const int n = panel * kRows + row;
      value = divide_eight(p.up + int64_t{n} * p.rank + rank, row_divisor(p.row_most, n));
    }
    uint16_t* to = p.up_out + ((int64_t{panel} * chunks + chunk) * kRows + row) * kRanks;
    *reinterpret_cast<uint4*>(to + (column ^ row % 8) * 8) = value;
  }
  const int64_t all = int64_t{p.m} * p.rank;
  for (int64_t i = (int64_t{panel} * 128 + threadIdx.x) * 8; i < all; i += int64_t{gridDim.x} * 128 * 8) {
    const uint4 value = divide_eight(p.low_rank + i, p.act_scale[i / p.rank]);
    *reinterpret_cast<uint4*>(p.low_rank_out + i) = value;
  }
}

}  // namespace nibble::sm90a
