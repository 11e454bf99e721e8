// The 4-bit linear in plain C++. Layout and formula: ../ops.h.
#include "common.h"
#include "kernels.h"

namespace nibble {
namespace {

// One token, one output: the integer dot of each group, times its scales.
float dot_scaled(const Linear& p, int64_t row, int64_t panel, int64_t lane) {
  const Weight& w = *p.w;
  const int64_t groups = w.k / kGroup;
  const uint8_t* codes = w.codes + panel * w.k * kPanel / 2;
  const uint16_t* scales = w.scales + panel * groups * kPanel;
  float sum = 0.0f;
  for (int64_t g = 0; g < groups; ++g) {
    int32_t dot = 0;
    for (int64_t block = g * 8; block < g * 8 + 8; ++block) {
      const uint8_t* bytes = codes + (block * kPanel + lane) * 4;
      const int8_t* act = p.codes + row * w.k + block * 8;
      for (int j = 0; j < 4; ++j) dot += ((bytes[j] & 15) - 8) * act[j] + ((bytes[j] >> 4) - 8) * act[4 + j];
    }
    const float scale = half_to_float(scales[g * kPanel + lane], w.scale_dtype);
    sum += static_cast<float>(dot) * (p.mode == ActMode::int8 ? scale : scale * p.scales[row * groups + g]);
  }
  return p.mode == ActMode::int8 ? sum * p.scales[row] : sum;
}

}  // namespace

int64_t linear_scratch_scalar(const Weight&, int64_t) {
  return 0;
}

void linear_scalar(const Linear& p, Range rows, Range panels, uint8_t*) {
  const Weight& w = *p.w;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    for (int64_t n = panels.begin * kPanel; n < min64(panels.end * kPanel, w.n); ++n) {
      const int64_t panel = n / kPanel, lane = n % kPanel;
      float v = dot_scaled(p, row, panel, lane);
      for (int64_t r = 0; r < w.rank; ++r) {
        const uint16_t up = w.up[((panel * w.rank + r) / 2 * kPanel + lane) * 2 + r % 2];
        v += half_to_float(up, w.low_rank_dtype) * p.low_rank[row * w.rank + r];
      }
      store_float(p.y, row * w.n + n, p.y_dtype, v + w.bias[n]);
    }
  }
}

}  // namespace nibble
