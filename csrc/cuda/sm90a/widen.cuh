// 4-bit weights made 8-bit for one product: e4m3 with one scale a row, as the matrix units take them from shared
// memory.
//
// For many tokens this pays: a product without group scales runs at FP8's full rate, and widening costs one pass over
// the weights. A code times its group's share of the row's largest scale is rounded to e4m3's four significant bits:
// 2.6 % of it on average, beside the 10 % that four bits a weight cost themselves.
//
// Out: blocks of 64 outputs by 128 inputs, [panel][step][64][128], each row's 16-byte chunks swizzled by the row.
#pragma once
#include "linear.cuh"

namespace nibble::sm90a {

constexpr int kWideBytes = kRows * kInputs;
constexpr float kLargest = 32;  // what a code of 1 becomes in the group with its row's largest scale

struct Widen {
  const uint8_t* codes;
  const uint16_t* wscales;
  const float* row_most;
  uint8_t* out;
  int steps, steps_each;
  DType scale_dtype;
};

// e4m3 of 0..7 times `unit`: eight bytes to choose from.
__device__ inline uint2 magnitudes(float unit) {
  const auto two = [&](int first) {
    uint16_t both;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"((first + 1) * unit), "f"(first * unit));
    return uint32_t{both};
  };
  return {two(0) | two(2) << 16, two(4) | two(6) << 16};
}

// Four codes in sign and magnitude (bits 7 and 2..0 of the bytes) to four bytes of e4m3.
__device__ inline uint32_t choose(uint32_t codes, uint2 from) {
  const uint32_t near = codes & 0x07070707u, joined = near | near >> 4;
  return __byte_perm(from.x, from.y, __byte_perm(joined, 0, 0x4420)) | (codes & 0x80808080u);
}

// Words c of lanes q of four: afterwards lane q holds word q of all four, in the order of the lanes.
__device__ inline uint4 gather_four(const uint32_t (&word)[4], int q) {
  const bool odd = q & 1, upper = q & 2;
  uint32_t w[4] = {word[0], word[1], word[2], word[3]};
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? w[i] : w[i + 1], 1);
    (odd ? w[i] : w[i + 1]) = got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? w[i] : w[i + 2], 2);
    (upper ? w[i] : w[i + 2]) = got;
  }
  return {w[0], w[1], w[2], w[3]};
}

// A block takes 64 outputs and some of the inputs, 128 at a time.
__global__ void __launch_bounds__(128) widen_kernel(const Widen p) {
  const int thread = threadIdx.x, lane = thread % 32, panel = blockIdx.x, low = thread / 32 * 16 + lane / 4;
  const uint16_t* scales = p.wscales + int64_t{panel} * 2 * p.steps * kRows + low;
  const auto inverse = [&](int row) {
    const float most = p.row_most[panel * kRows + row];
    return most > 0.0f ? kLargest / most : 0.0f;
  };
  const float units[2] = {inverse(low), inverse(low + 8)};
  const int first = blockIdx.y * p.steps_each, last = min(first + p.steps_each, p.steps);
#pragma unroll 2
  for (int step = first; step < last; ++step) {
    const int64_t block = int64_t{panel} * p.steps + step;
    uint8_t* out = p.out + block * kWideBytes + low * kInputs;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 w =
          *reinterpret_cast<const uint4*>(p.codes + block * kCodeBytes + half * (kCodeBytes / 2) + thread * 16);
      const uint16_t* group = scales + (step * 2 + half) * kRows;
      uint32_t words[2][4];
      widen(w, words[0], words[1]);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const uint2 from = magnitudes(units[row] * scale_value(group[row * 8], p.scale_dtype));
        // In the order of their chunks of 16 inputs; a lane has four inputs of each.
        const uint32_t mine[4] = {choose(words[0][row], from), choose(words[0][2 + row], from),
                                  choose(words[1][row], from), choose(words[1][2 + row], from)};
        const int chunk = half * 4 + lane % 4;
        *reinterpret_cast<uint4*>(out + row * 8 * kInputs + ((chunk ^ (low & 7)) << 4)) = gather_four(mine, lane % 4);
      }
    }
  }
}

}  // namespace nibble::sm90a
