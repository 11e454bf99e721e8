// The weight-only linear (W4A16) for AVX2: 1 or 2 tokens x 16 outputs a tile, made for few tokens.
// Per group: sum += scale * (codes . x) + zero * sum(x).
#include "avx2.h"
#include "kernels.h"

namespace nibble {
namespace {

constexpr int kTile = 2;

template <DType X, int Rows>
void multiply(const AwqLinear& p, int64_t row, int64_t panel) {
  const int64_t groups = p.k / kGroup;
  const uint8_t* codes = p.codes + panel * p.k * kPanel / 2;
  const char* x = static_cast<const char*>(p.x) + row * p.x_stride * size_of(X);
  const __m256i low_nibble = _mm256_set1_epi32(15);
  __m256 acc[Rows][2];
  NIBBLE_UNROLL
  for (int i = 0; i < Rows; ++i) NIBBLE_UNROLL
  for (int h = 0; h < 2; ++h) acc[i][h] = _mm256_loadu_ps(p.bias + panel * kPanel + 8 * h);
  for (int64_t g = 0; g < groups; ++g) {
    __m256 dot[Rows][2], plain[Rows];
    NIBBLE_UNROLL
    for (int i = 0; i < Rows; ++i) dot[i][0] = dot[i][1] = plain[i] = _mm256_setzero_ps();
    for (int b = 0; b < 8; ++b, codes += 64) {
      const __m256i both[2] = {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)),
                               _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 32))};
      NIBBLE_UNROLL
      for (int j = 0; j < 8; ++j) {
        const int shift = 8 * (j % 4) + 4 * (j / 4);
        __m256 code[2];
        NIBBLE_UNROLL
        for (int h = 0; h < 2; ++h) {
          code[h] = _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(both[h], shift), low_nibble));
        }
        NIBBLE_UNROLL
        for (int i = 0; i < Rows; ++i) {
          const __m256 v = broadcast8<X>(x, i * p.x_stride + g * kGroup + b * 8 + j);
          NIBBLE_UNROLL
          for (int h = 0; h < 2; ++h) dot[i][h] = _mm256_fmadd_ps(code[h], v, dot[i][h]);
          plain[i] = _mm256_add_ps(plain[i], v);
        }
      }
    }
    NIBBLE_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int64_t at = (panel * groups + g) * kPanel + 8 * h;
      const __m256 scale = load8_as(p.scale_dtype, p.scales, at), zero = load8_as(p.scale_dtype, p.zeros, at);
      NIBBLE_UNROLL
      for (int i = 0; i < Rows; ++i) {
        acc[i][h] = _mm256_fmadd_ps(zero, plain[i], _mm256_fmadd_ps(scale, dot[i][h], acc[i][h]));
      }
    }
  }
  NIBBLE_UNROLL
  for (int i = 0; i < Rows; ++i) {
    for (int64_t h = 0, n = panel * kPanel; h < 2 && n < p.n; ++h, n += 8) {
      store8(p.y, (row + i) * p.n + n, p.y_dtype, acc[i][h], p.n - n);
    }
  }
}

template <DType X>
void multiply_panels(const AwqLinear& p, Range panels) {
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    int64_t row = 0;
    for (; row + kTile <= p.m; row += kTile) multiply<X, kTile>(p, row, panel);
    for (; row < p.m; ++row) multiply<X, 1>(p, row, panel);
  }
}

}  // namespace

void awq_linear_avx2(const AwqLinear& p, Range panels) {
  switch (p.x_dtype) {
    case DType::bf16:
      return multiply_panels<DType::bf16>(p, panels);
    case DType::fp16:
      return multiply_panels<DType::fp16>(p, panels);
    case DType::fp32:
      return multiply_panels<DType::fp32>(p, panels);
  }
}

}  // namespace nibble
