// The weight-only linear (W4A16) for AVX-512: 1 to 4 tokens x 16 outputs a tile, made for few tokens.
// vpermps looks a code up in a table of the 16 floats 0..15 and reads only the low four bits of each lane, so a shift
// and a look-up replace shift, mask and conversion. Per group: sum += scale * (codes . x) + zero * sum(x).
#include "avx512.h"
#include "kernels.h"

namespace nibble {
namespace {

template <int Rows>
void multiply(const AwqLinear& p, int64_t row, int64_t panel) {
  const int64_t groups = p.k / kGroup;
  const uint8_t* codes = p.codes + panel * p.k * kPanel / 2;
  const float* x = p.x + row * p.x_stride;
  const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512 acc[Rows];
  NIBBLE_UNROLL
  for (int i = 0; i < Rows; ++i) acc[i] = _mm512_loadu_ps(p.bias + panel * kPanel);
  for (int64_t g = 0; g < groups; ++g, x += kGroup) {
    __m512 dot[Rows][2];
    NIBBLE_UNROLL
    for (int i = 0; i < Rows; ++i) dot[i][0] = dot[i][1] = _mm512_setzero_ps();
    for (int b = 0; b < 8; ++b, codes += 64) {
      const __m512i both = _mm512_loadu_si512(codes);
      NIBBLE_UNROLL
      for (int j = 0; j < 8; ++j) {
        const unsigned shift = static_cast<unsigned>(8 * (j % 4) + 4 * (j / 4));
        const __m512 code = _mm512_permutexvar_ps(_mm512_srli_epi32(both, shift), table);
        NIBBLE_UNROLL
        for (int i = 0; i < Rows; ++i) {
          const __m512 v = _mm512_set1_ps(x[i * p.x_stride + b * 8 + j]);
          dot[i][j % 2] = _mm512_fmadd_ps(code, v, dot[i][j % 2]);
        }
      }
    }
    const __m512 scale = load16_as(p.scale_dtype, p.scales, (panel * groups + g) * kPanel);
    const __m512 zero = load16_as(p.scale_dtype, p.zeros, (panel * groups + g) * kPanel);
    NIBBLE_UNROLL
    for (int i = 0; i < Rows; ++i) {
      const float* run = x + i * p.x_stride;
      const __m512 half[2] = {_mm512_add_ps(_mm512_loadu_ps(run), _mm512_loadu_ps(run + 16)),
                              _mm512_add_ps(_mm512_loadu_ps(run + 32), _mm512_loadu_ps(run + 48))};
      const __m512 plain = _mm512_set1_ps(_mm512_reduce_add_ps(_mm512_add_ps(half[0], half[1])));
      acc[i] = _mm512_fmadd_ps(scale, _mm512_add_ps(dot[i][0], dot[i][1]), acc[i]);
      acc[i] = _mm512_fmadd_ps(zero, plain, acc[i]);
    }
  }
  const int64_t left = p.n - panel * kPanel;
  const __mmask16 mask = left >= kPanel ? 0xffff : static_cast<__mmask16>((1u << left) - 1u);
  NIBBLE_UNROLL
  for (int i = 0; i < Rows; ++i) store16(p.y, (row + i) * p.n + panel * kPanel, p.y_dtype, acc[i], mask);
}

}  // namespace

void awq_linear_avx512(const AwqLinear& p, Range panels) {
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    int64_t row = 0;
    for (; row + 4 <= p.m; row += 4) multiply<4>(p, row, panel);
    for (; row + 2 <= p.m; row += 2) multiply<2>(p, row, panel);
    for (; row < p.m; ++row) multiply<1>(p, row, panel);
  }
}

}  // namespace nibble
