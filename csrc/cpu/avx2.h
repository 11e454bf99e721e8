// AVX2 + FMA + F16C loads, stores and conversions shared by the avx2 files. `static inline` as in common.h.
#pragma once
#include <immintrin.h>

#include "common.h"

namespace nibble {

// 8 values from element i of an array of type T.
template <DType T>
static inline __m256 load8(const void* x, int64_t i) {
  if constexpr (T == DType::fp32) return _mm256_loadu_ps(static_cast<const float*>(x) + i);
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(x) + i));
  if constexpr (T == DType::fp16) return _mm256_cvtph_ps(h);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

static inline __m256 load8_as(DType t, const void* x, int64_t i) {
  return t == DType::bf16 ? load8<DType::bf16>(x, i) : load8<DType::fp16>(x, i);
}

// Element i of an array of type T in all lanes.
template <DType T>
static inline __m256 broadcast8(const void* x, int64_t i) {
  if constexpr (T == DType::fp32) return _mm256_set1_ps(static_cast<const float*>(x)[i]);
  const uint16_t h = static_cast<const uint16_t*>(x)[i];
  if constexpr (T == DType::bf16) return _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(h) << 16));
  return _mm256_cvtph_ps(_mm_set1_epi16(static_cast<int16_t>(h)));
}

// Even and odd elements of 8 pairs of type t.
static inline void load_pairs(DType t, const uint16_t* from, __m256* even, __m256* odd) {
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  if (t == DType::bf16) {
    *even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    *odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  } else {
    const __m256i low = _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff)), high = _mm256_srli_epi32(pairs, 16);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
    *even = _mm256_cvtph_ps(_mm256_castsi256_si128(words));
    *odd = _mm256_cvtph_ps(_mm256_extracti128_si256(words, 1));
  }
}

static inline __m128i narrow_bf16_8(__m256 v) {
  const __m256i u = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i rounded = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}

// Writes the first `count` lanes to element i of an array of type t.
static inline void store8(void* y, int64_t i, DType t, __m256 v, int64_t count) {
  if (count < 8) {
    float lanes[8];
    _mm256_storeu_ps(lanes, v);
    for (int64_t j = 0; j < count; ++j) store_float(y, i + j, t, lanes[j]);
  } else if (t == DType::fp32) {
    _mm256_storeu_ps(static_cast<float*>(y) + i, v);
  } else {
    const __m128i h = t == DType::bf16 ? narrow_bf16_8(v) : _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(y) + i), h);
  }
}

}  // namespace nibble
