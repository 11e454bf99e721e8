// 4-bit weights made 8-bit for one product: e4m3 with one scale a row, as the matrix units take them from shared
// memory.
//
// For many tokens this pays: a product without group scales runs at FP8's full rate, and widening costs one pass over
// the weights. A code times its group's share of the row's largest scale is rounded to e4m3's four significant bits:
// 2.6 % of it on average, beside the 10 % that four bits a weight cost themselves.
//
// NVFP4 takes the same way: its codes are signs and three bits already, of which the choice is another, and a chunk of
// 16 inputs is just one of its groups.
//
// Out: blocks of 64 outputs by 128 inputs, [panel][step][64][128], each row's 16-byte chunks swizzled by the row. The
// low-rank branch follows them, divided by the product's scales (divide.cuh).
#pragma once
#include "divide.cuh"

namespace nibble::sm90a {

struct Widen {
  const uint8_t* codes;
  const void* wscales;
  const float* row_most;
  uint8_t* out;
  int steps, steps_each;
  DType scale_dtype;
  Divide divide;
};

// What three bits of magnitude stand for: 0..7, or e2m1's 0, 0.5, 1, 1.5, 2, 3, 4, 6.
template <bool kE2m1>
__device__ inline float code_value(int code) {
  if constexpr (!kE2m1) return static_cast<float>(code);
  return code < 4 ? 0.5f * code : code == 7 ? 6.0f : code - 2.0f;
}

// e4m3 of the eight magnitudes times `unit`: bytes to choose from.
template <bool kE2m1>
__device__ inline uint2 magnitudes(float unit) {
  const auto two = [&](int first) {
    uint16_t both;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;"
        : "=h"(both)
        : "f"(code_value<kE2m1>(first + 1) * unit), "f"(code_value<kE2m1>(first) * unit));
    return uint32_t{both};
  };
  return {two(0) | two(2) << 16, two(4) | two(6) << 16};
}

__device__ inline float e4m3_value(uint8_t bits) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(bits)));
  return __half2float(__ushort_as_half(static_cast<uint16_t>(halves)));
}

// Four codes in sign and magnitude (bits 7 and 2..0 of the bytes) to four bytes of e4m3.
__device__ inline uint32_t choose(uint32_t codes, uint2 from) {
  const uint32_t near = codes & 0x07070707u, joined = near | near >> 4;
  return __byte_perm(from.x, from.y, __byte_perm(joined, 0, 0x4420)) ^ (codes & 0x80808080u);
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

// A block takes 64 outputs and some of the inputs, 128 at a time; where there is a low-rank branch, the grid's last row
// is what divides it. Scales: INT4 [64 outputs] for each 64 inputs, NVFP4 [4 groups][64 outputs].
template <bool kNvfp4>
__global__ void __launch_bounds__(128) widen_kernel(const Widen p) {
  const int thread = threadIdx.x, lane = thread % 32, panel = blockIdx.x, low = thread / 32 * 16 + lane / 4;
  launch_next();
  if (blockIdx.y * p.steps_each >= p.steps) {
    divide(p.divide, panel);
    return;
  }
  const int64_t groups = int64_t{panel} * 2 * p.steps;  // of 64 inputs, before this block's
  const auto inverse = [&](int row) {
    const float most = p.row_most[panel * kRows + row];
    // NVFP4 has other factors in a row's scale; where they make it zero, so must be what it scales.
    return most > 0.0f && p.divide.row_most[panel * kRows + row] != 0.0f ? kLargest / most : 0.0f;
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
      const int64_t group = (groups + step * 2 + half) * kRows;
      uint32_t words[2][4];
      widen(w, words[0], words[1]);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const uint32_t codes[4] = {words[0][row], words[0][2 + row], words[1][row], words[1][2 + row]};
        // In the order of their chunks of 16 inputs; a lane has four inputs of each.
        uint32_t mine[4];
        if constexpr (kNvfp4) {
          const auto* scale = static_cast<const uint8_t*>(p.wscales) + group * 4 + low + row * 8;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            mine[i] = choose(codes[i], magnitudes<true>(units[row] * e4m3_value(scale[i * kRows])));
          }
        } else {
          const uint16_t scale = static_cast<const uint16_t*>(p.wscales)[group + low + row * 8];
          const uint2 from = magnitudes<false>(units[row] * scale_value(scale, p.scale_dtype));
#pragma unroll
          for (int i = 0; i < 4; ++i) mine[i] = choose(codes[i], from);
        }
        const int chunk = half * 4 + lane % 4;
        *reinterpret_cast<uint4*>(out + row * 8 * kInputs + ((chunk ^ (low & 7)) << 4)) = gather_four(mine, lane % 4);
      }
    }
  }
}

}  // namespace nibble::sm90a
