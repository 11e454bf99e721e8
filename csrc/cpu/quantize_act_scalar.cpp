// Activation quantization in plain C++: for processors older than AVX2, and the simplest statement of the arithmetic.
// Single operations on fp32 in a fixed order, so every instruction set gives the same codes bit for bit.
#include "common.h"
#include "kernels.h"

namespace nibble {
namespace {

// Adding and removing 1.5 * 2^23 rounds to the nearest integer, halves to even, for |v| < 2^22.
int32_t round_half_even(float v) {
  volatile float lifted = v + 12582912.0f;
  return static_cast<int32_t>(lifted - 12582912.0f);
}

// One token, inputs [k0, k1): writes codes, returns the scale.
float quantize_run(const QuantizeAct& p, int64_t row, int64_t k0, int64_t k1) {
  const float levels = levels_of(p.mode), shift = p.mode == ActMode::uint4 ? kUnsignedShift : 0.0f;
  const int32_t lowest = p.mode == ActMode::uint4 ? 0 : p.mode == ActMode::int4 ? -8 : -127;
  auto smoothed = [&](int64_t k) {
    float v = load_float(p.x, row * p.x_stride + k, p.x_dtype);
    if (p.mode == ActMode::uint4) v += shift;
    return v * p.w->inv_smooth[k];
  };
  uint32_t largest = 0;  // comparing magnitudes as integers lets NaN win, so it reaches the scale
  for (int64_t k = k0; k < k1; ++k) {
    uint32_t magnitude = float_to_bits(smoothed(k)) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  const float m = bits_to_float(largest);
  int8_t* codes = p.codes + row * p.w->k;
  const bool usable = m >= kTinyMax && largest < 0x7f800000u;
  const float inverse = usable ? levels / m : 0.0f;
  for (int64_t k = k0; k < k1; ++k) {
    int32_t q = usable ? round_half_even(smoothed(k) * inverse) : 0;
    q = q < lowest ? lowest : q > levels ? static_cast<int32_t>(levels) : q;
    codes[k] = static_cast<int8_t>(q);
  }
  return m < kTinyMax ? 0.0f : m * (1.0f / levels);
}

void low_rank_row(const QuantizeAct& p, int64_t row) {
  const Weight& w = *p.w;
  float* out = p.low_rank + row * w.rank;
  for (int64_t r = 0; r < w.rank; ++r) out[r] = 0.0f;
  for (int64_t k = 0; k < w.k; ++k) {
    const float v = load_float(p.x, row * p.x_stride + k, p.x_dtype);
    const uint16_t* down = w.down + (k / 2) * w.rank * 2 + k % 2;
    for (int64_t r = 0; r < w.rank; ++r) out[r] += v * half_to_float(down[r * 2], w.low_rank_dtype);
  }
}

}  // namespace

void quantize_act_scalar(const QuantizeAct& p, Range rows) {
  const int64_t run = p.mode == ActMode::int8 ? p.w->k : kGroup, runs = p.w->k / run;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    low_rank_row(p, row);
    for (int64_t i = 0; i < runs; ++i) p.scales[row * runs + i] = quantize_run(p, row, i * run, (i + 1) * run);
  }
}

}  // namespace nibble
