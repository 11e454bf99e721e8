// The end of a linear for AVX-512, shared by the avx512 and amx files.
#pragma once
#include "avx512.h"

namespace nibble {
namespace {

// y[row + i][panel] = acc[i] + sum over r of up[r] * low_rank[row + i][r] + bias, converted and stored.
template <int Rows>
inline void finish(const Linear& p, int64_t row, int64_t panel, __m512* acc) {
  const Weight& w = *p.w;
  const float* low_rank = p.low_rank + row * w.rank;
  for (int64_t r = 0; r < w.rank; ++r) {
    const __m512 up = load16_as(w.low_rank_dtype, w.up, (panel * w.rank + r) * kPanel);
    for (int i = 0; i < Rows; ++i) acc[i] = _mm512_fmadd_ps(up, _mm512_set1_ps(low_rank[i * w.rank + r]), acc[i]);
  }
  const __m512 bias = _mm512_loadu_ps(w.bias + panel * kPanel);
  const int64_t left = w.n - panel * kPanel;
  const __mmask16 mask = left >= kPanel ? 0xffff : static_cast<__mmask16>((1u << left) - 1u);
  for (int i = 0; i < Rows; ++i) {
    store16(p.y, (row + i) * w.n + panel * kPanel, p.y_dtype, _mm512_add_ps(acc[i], bias), mask);
  }
}

}  // namespace
}  // namespace nibble
