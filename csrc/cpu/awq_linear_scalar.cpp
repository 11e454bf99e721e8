// The weight-only linear (W4A16) in plain C++. Layout and formula: ../ops.h.
#include "common.h"
#include "kernels.h"

namespace nibble {
void awq_linear_scalar(const AwqLinear& p, Range panels) {
  const int64_t groups = p.k / kGroup;
  for (int64_t n = panels.begin * kPanel; n < min64(panels.end * kPanel, p.n); ++n) {
    const int64_t panel = n / kPanel, lane = n % kPanel;
    for (int64_t row = 0; row < p.m; ++row) {
      float sum = p.bias[n];
      for (int64_t g = 0; g < groups; ++g) {
        float weighted = 0.0f, plain = 0.0f;  // sum of code * x and of x over the group
        for (int64_t k = g * kGroup; k < (g + 1) * kGroup; ++k) {
          const uint8_t byte = p.codes[((panel * p.k / 8 + k / 8) * kPanel + lane) * 4 + k % 4];
          const float x = p.x[row * p.x_stride + k];
          weighted += static_cast<float>(k % 8 < 4 ? byte & 15 : byte >> 4) * x;
          plain += x;
        }
        const int64_t at = (panel * groups + g) * kPanel + lane;
        sum += half_to_float(p.scales[at], p.scale_dtype) * weighted;
        sum += half_to_float(p.zeros[at], p.scale_dtype) * plain;
      }
      store_float(p.y, row * p.n + n, p.y_dtype, sum);
    }
  }
}

}  // namespace nibble
