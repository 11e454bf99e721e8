// AVX-512 loads, stores and conversions shared by the avx512 and amx files. `static inline` as in common.h.
#pragma once
#include <immintrin.h>

#include "common.h"

namespace nibble {

static inline __m512 widen_bf16(__m256i h) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

// 16 values from element i of an array of type T.
template <DType T>
static inline __m512 load16(const void* x, int64_t i) {
  if constexpr (T == DType::fp32) return _mm512_loadu_ps(static_cast<const float*>(x) + i);
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(x) + i));
  return T == DType::bf16 ? widen_bf16(h) : _mm512_cvtph_ps(h);
}

// Element i of an array of type T in all lanes.
template <DType T>
static inline __m512 broadcast(const void* x, int64_t i) {
  if constexpr (T == DType::fp32) return _mm512_set1_ps(static_cast<const float*>(x)[i]);
  const uint16_t h = static_cast<const uint16_t*>(x)[i];
  if constexpr (T == DType::bf16) return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(h) << 16));
  return _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<int16_t>(h)));
}

static inline __m512 load16_as(DType t, const void* x, int64_t i) {
  return t == DType::bf16 ? load16<DType::bf16>(x, i) : load16<DType::fp16>(x, i);
}

// Even and odd elements of 16 pairs of type t.
static inline void load_pairs(DType t, const uint16_t* from, __m512* even, __m512* odd) {
  const __m512i pairs = _mm512_loadu_si512(from);
  if (t == DType::bf16) {
    *even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    *odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  } else {
    *even = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs));
    *odd = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
  }
}

static inline __m256i narrow_bf16(__m512 v) {
  const __m512i u = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
}

// Writes the lanes of `mask` to element i of an array of type t.
static inline void store16(void* y, int64_t i, DType t, __m512 v, __mmask16 mask) {
  if (t == DType::fp32) {
    _mm512_mask_storeu_ps(static_cast<float*>(y) + i, mask, v);
    return;
  }
  const __m256i h = t == DType::bf16 ? narrow_bf16(v) : _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  _mm256_mask_storeu_epi16(static_cast<uint16_t*>(y) + i, mask, h);
}

}  // namespace nibble
