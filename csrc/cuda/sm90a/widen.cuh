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
constexpr float kLargest = 32;  // a code of 1 in the group with the row's largest scale: 8 of them stay below 448

struct Widen {
  const uint8_t* codes;
  const uint16_t* wscales;
  uint8_t* out;
  float* row_scale;
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

// A block takes 64 outputs and some of the inputs, 128 at a time.
__global__ void __launch_bounds__(128) widen_kernel(const Widen p) {
  __shared__ float most[2][kRows];
  const int thread = threadIdx.x, lane = thread % 32, panel = blockIdx.x, groups = 2 * p.steps;
  const uint16_t* scales = p.wscales + int64_t{panel} * groups * kRows;
  float largest = 0.0f;
  for (int g = thread / kRows; g < groups; g += 2) {
    largest = fmaxf(largest, fabsf(scale_value(scales[g * kRows + thread % kRows], p.scale_dtype)));
  }
  most[thread / kRows][thread % kRows] = largest;
  __syncthreads();
  const auto row_most = [&](int row) { return fmaxf(most[0][row], most[1][row]); };
  if (blockIdx.y == 0 && thread < kRows) p.row_scale[panel * kRows + thread] = row_most(thread) / kLargest;
  const int low = thread / 32 * 16 + lane / 4;
  const auto inverse = [&](int row) { return row_most(row) > 0.0f ? kLargest / row_most(row) : 0.0f; };
  const float units[2] = {inverse(low), inverse(low + 8)};
  const int first = blockIdx.y * p.steps_each, last = min(first + p.steps_each, p.steps);
  for (int step = first; step < last; ++step) {
    const int64_t block = int64_t{panel} * p.steps + step;
    uint8_t* out = p.out + block * kWideBytes + low * kInputs + lane % 4 * 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 w =
          *reinterpret_cast<const uint4*>(p.codes + block * kCodeBytes + half * (kCodeBytes / 2) + thread * 16);
      const uint16_t* group = scales + (step * 2 + half) * kRows + low;
      const uint2 from[2] = {magnitudes(units[0] * scale_value(group[0], p.scale_dtype)),
                             magnitudes(units[1] * scale_value(group[8], p.scale_dtype))};
      uint32_t words[2][4];
      widen(w, words[0], words[1]);
#pragma unroll
      for (int i = 0; i < 8; ++i) {  // 32 inputs of the block, the half of those, the row
        const int inputs = i / 4, part = i / 2 % 2, row = i % 2;
        const int chunk = half * 4 + inputs * 2 + part;
        *reinterpret_cast<uint32_t*>(out + row * 8 * kInputs + ((chunk ^ (low & 7)) << 4)) =
            choose(words[inputs][part * 2 + row], from[row]);
      }
    }
  }
}

}  // namespace nibble::sm90a
