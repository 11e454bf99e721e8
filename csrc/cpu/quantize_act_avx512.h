// Activation quantization for AVX-512, shared by the two files that differ in the low-rank product alone.
// A tile of tokens is read from memory once: the low-rank product reads it first, the quantization then finds it in
// the cache, twice (the largest value must be known before the first code can be written).
#pragma once
#include "avx512.h"

namespace nibble {
namespace {

template <DType X, bool Shift>
inline __m512 smoothed16(const void* row, const float* inv_smooth, int64_t k) {
  __m512 v = load16<X>(row, k);
  if (Shift) v = _mm512_add_ps(v, _mm512_set1_ps(kUnsignedShift));
  return _mm512_mul_ps(v, _mm512_loadu_ps(inv_smooth + k));
}

// Magnitudes are compared as integers: NaN is then the largest, so it reaches the scale.
inline __m512i magnitude(__m512 v) {
  return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
}

struct RunScale {
  float scale, inverse;
  bool usable;  // false: all codes are zero
};

inline RunScale run_scale(uint32_t largest, float levels) {
  const float m = bits_to_float(largest);
  const bool usable = m >= kTinyMax && largest < 0x7f800000u;
  return {m < kTinyMax ? 0.0f : m * (1.0f / levels), usable ? levels / m : 0.0f, usable};
}

template <DType X>
inline void quantize_token_int8(const void* row, const float* inv_smooth, int64_t k_count, int8_t* codes,
                                float* scale) {
  __m512i largest[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  for (int64_t k = 0; k < k_count; k += 32) {
    NIBBLE_UNROLL
    for (int i = 0; i < 2; ++i) {
      largest[i] = _mm512_max_epu32(largest[i], magnitude(smoothed16<X, false>(row, inv_smooth, k + 16 * i)));
    }
  }
  const RunScale s = run_scale(_mm512_reduce_max_epu32(_mm512_max_epu32(largest[0], largest[1])), 127.0f);
  *scale = s.scale;
  if (!s.usable) {
    memset(codes, 0, static_cast<size_t>(k_count));
    return;
  }
  const __m512 inverse = _mm512_set1_ps(s.inverse);
  for (int64_t k = 0; k < k_count; k += 16) {
    const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(smoothed16<X, false>(row, inv_smooth, k), inverse));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + k), _mm512_cvtsepi32_epi8(q));
  }
}

template <DType X, bool Unsigned>
inline void quantize_token_int4(const void* row, const float* inv_smooth, int64_t k_count, int8_t* codes,
                                float* scales) {
  const __m512i lowest = _mm512_set1_epi32(Unsigned ? 0 : -8), highest = _mm512_set1_epi32(Unsigned ? 15 : 7);
  for (int64_t k = 0; k < k_count; k += kGroup) {
    __m512 t[4];
    __m512i largest = _mm512_setzero_si512();
    NIBBLE_UNROLL
    for (int i = 0; i < 4; ++i) {
      t[i] = smoothed16<X, Unsigned>(row, inv_smooth, k + 16 * i);
      largest = _mm512_max_epu32(largest, magnitude(t[i]));
    }
    const RunScale s = run_scale(_mm512_reduce_max_epu32(largest), Unsigned ? 15.0f : 7.0f);
    scales[k / kGroup] = s.scale;
    NIBBLE_UNROLL
    for (int i = 0; i < 4; ++i) {
      __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(t[i], _mm512_set1_ps(s.inverse)));
      q = s.usable ? _mm512_max_epi32(lowest, _mm512_min_epi32(highest, q)) : _mm512_setzero_si512();
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + k + 16 * i), _mm512_cvtepi32_epi8(q));
    }
  }
}

template <DType X>
inline void quantize_token(const QuantizeAct& p, int64_t row) {
  const int64_t k = p.w->k;
  const void* x = static_cast<const char*>(p.x) + row * p.x_stride * size_of(X);
  int8_t* codes = p.codes + row * k;
  if (p.mode == ActMode::int8) quantize_token_int8<X>(x, p.w->inv_smooth, k, codes, p.scales + row);
  float* scales = p.scales + row * (k / kGroup);
  if (p.mode == ActMode::int4) quantize_token_int4<X, false>(x, p.w->inv_smooth, k, codes, scales);
  if (p.mode == ActMode::uint4) quantize_token_int4<X, true>(x, p.w->inv_smooth, k, codes, scales);
}

// low_rank rows [row, row + Rows), ranks [r, r + 16 * Vectors), in fp32. Any mix of types.
template <DType X, DType L, int Rows, int Vectors>
inline void low_rank_tile(const QuantizeAct& p, int64_t row, int64_t r) {
  const int64_t rank = p.w->rank;
  const char* x = static_cast<const char*>(p.x) + row * p.x_stride * size_of(X);
  __m512 sum[Rows][Vectors];
  NIBBLE_UNROLL
  for (int i = 0; i < Rows; ++i) {
    NIBBLE_UNROLL
    for (int v = 0; v < Vectors; ++v) sum[i][v] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < p.w->k; k += 2) {
    __m512 even[Vectors], odd[Vectors];
    NIBBLE_UNROLL
    for (int v = 0; v < Vectors; ++v) load_pairs(L, p.w->down + (k / 2 * rank + r + 16 * v) * 2, even + v, odd + v);
    NIBBLE_UNROLL
    for (int i = 0; i < Rows; ++i) {
      const __m512 x_even = broadcast<X>(x, i * p.x_stride + k), x_odd = broadcast<X>(x, i * p.x_stride + k + 1);
      NIBBLE_UNROLL
      for (int v = 0; v < Vectors; ++v) {
        sum[i][v] = _mm512_fmadd_ps(x_odd, odd[v], _mm512_fmadd_ps(x_even, even[v], sum[i][v]));
      }
    }
  }
  NIBBLE_UNROLL
  for (int i = 0; i < Rows; ++i) {
    NIBBLE_UNROLL
    for (int v = 0; v < Vectors; ++v) _mm512_storeu_ps(p.low_rank + (row + i) * rank + r + 16 * v, sum[i][v]);
  }
}

}  // namespace
}  // namespace nibble
