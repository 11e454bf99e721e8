// The up-projection in the units of a widened product: divided by the scales of the outputs, its terms go to the same
// sums as the product's, and one scaling of the rows at the end serves both.
//
// Out: [panel][rank / 64][64][64] bf16, swizzled as the weights are.
#pragma once
#include "linear.cuh"

namespace nibble::sm90a {

constexpr int kWideBytes = kRows * kInputs;  // of a stage's weights, or of 64 ranks of `up`
constexpr float kLargest = 32;               // what a code of 1 becomes in the group with its row's largest scale

struct Divide {
  const uint16_t* up;
  const float* row_most;
  uint16_t* out;
  int rank;
};

// A row whose scale is zero has codes of zero: 1 does as well there, and can be divided by.
__device__ inline float row_divisor(const float* row_most, int n) {
  const float scale = row_most[n] / kLargest;
  return scale == 0.0f ? 1.0f : scale;
}

__device__ inline uint4 divide_eight(const uint16_t* from, float by) {
  const uint4 raw = *reinterpret_cast<const uint4*>(from);
  const auto two = [&](uint32_t word) {
    return pack_two(__uint_as_float(word << 16) / by, __uint_as_float(word & 0xffff0000u) / by);
  };
  return {two(raw.x), two(raw.y), two(raw.z), two(raw.w)};
}

// A block's part: 64 rows. 128 threads.
__device__ inline void divide(const Divide& p, int panel) {
  const int chunks = (p.rank + kRanks - 1) / kRanks;
  for (int i = threadIdx.x; i < chunks * kRows * 8; i += 128) {
    const int chunk = i / (kRows * 8), row = i / 8 % kRows, column = i % 8, rank = chunk * kRanks + column * 8;
    uint4 value{};
    if (rank < p.rank) {
      const int n = panel * kRows + row;
      value = divide_eight(p.up + int64_t{n} * p.rank + rank, row_divisor(p.row_most, n));
    }
    uint16_t* to = p.out + ((int64_t{panel} * chunks + chunk) * kRows + row) * kRanks;
    *reinterpret_cast<uint4*>(to + (column ^ row % 8) * 8) = value;
  }
}

}  // namespace nibble::sm90a
