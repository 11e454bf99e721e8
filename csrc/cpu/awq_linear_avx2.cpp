// The weight-only linear (W4A16) for AVX2: 1 or 2 tokens x 16 outputs a tile, made for few tokens.
// Per group: sum += scale * (codes . x) + zero * sum(x).
#include "avx2.h"
#include "kernels.h"

namespace nibble {
namespace {

inline float sum_of_group(const float* x) {
  __m256 sum = _mm256_loadu_ps(x);
  for (int i = 8; i < kGroup; i += 8) sum = _mm256_add_ps(sum, _mm256_loadu_ps(x + i));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

template <int Rows>
void multiply(const AwqLinear& p, int64_t row, int64_t panel) {
  const int64_t groups = p.k / kGroup;
  const uint8_t* codes = p.codes + panel * p.k * kPanel / 2;
  const float* x = p.x + row * p.x_stride;
  const __m256i low_nibble = _mm256_set1_epi32(15);
  __m256 acc[Rows][2];
  NIBBLE_UNROLL
  for (int i = 0; i < Rows; ++i) {
    acc[i][0] = _mm256_loadu_ps(p.bias + panel * kPanel);
    acc[i][1] = _mm256_loadu_ps(p.bias + panel * kPanel + 8);
  }
  for (int64_t g = 0; g < groups; ++g, x += kGroup) {
    __m256 dot[Rows][2];
    NIBBLE_UNROLL
    for (int i = 0; i < Rows; ++i) dot[i][0] = dot[i][1] = _mm256_setzero_ps();
    for (int b = 0; b < 8; ++b, codes += 64) {
      const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
      const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 32));
      NIBBLE_UNROLL
      for (int j = 0; j < 8; ++j) {
        const int shift = 8 * (j % 4) + 4 * (j / 4);
        const __m256 code[2] = {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(first, shift), low_nibble)),
                                _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(second, shift), low_nibble))};
        NIBBLE_UNROLL
        for (int i = 0; i < Rows; ++i) {
          const __m256 v = _mm256_set1_ps(x[i * p.x_stride + b * 8 + j]);
          dot[i][0] = _mm256_fmadd_ps(code[0], v, dot[i][0]);
          dot[i][1] = _mm256_fmadd_ps(code[1], v, dot[i][1]);
        }
      }
    }
    NIBBLE_UNROLL
    for (int i = 0; i < Rows; ++i) {
      const __m256 plain = _mm256_set1_ps(sum_of_group(x + i * p.x_stride));
      NIBBLE_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int64_t at = (panel * groups + g) * kPanel + 8 * h;
        const __m256 scale = load8_as(p.scale_dtype, p.scales, at), zero = load8_as(p.scale_dtype, p.zeros, at);
        acc[i][h] = _mm256_fmadd_ps(zero, plain, _mm256_fmadd_ps(scale, dot[i][h], acc[i][h]));
      }
    }
  }
  for (int i = 0; i < Rows; ++i) {
    for (int64_t h = 0, n = panel * kPanel; h < 2 && n < p.n; ++h, n += 8) {
      store8(p.y, (row + i) * p.n + n, p.y_dtype, acc[i][h], p.n - n);
    }
  }
}

}  // namespace

void awq_linear_avx2(const AwqLinear& p, Range panels) {
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    int64_t row = 0;
    for (; row + 2 <= p.m; row += 2) multiply<2>(p, row, panel);
    for (; row < p.m; ++row) multiply<1>(p, row, panel);
  }
}

}  // namespace nibble
