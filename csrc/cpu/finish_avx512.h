// The low-rank branch and the end of a linear for AVX-512, shared by the avx512 and amx files.
//
// With AVX512-BF16, and where factors and results are bfloat16, the low-rank tokens are rounded to bfloat16 (as the
// published kernels do) and two ranks go into each vdpbf16ps; otherwise all is fp32.
#pragma once
#include "avx512.h"

namespace nibble {
namespace {

// rows[i] holds 16 dwords of token i; afterwards rows[j] holds dword j of the 16 tokens.
inline void transpose16(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    NIBBLE_UNROLL
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  }
  NIBBLE_UNROLL
  for (int i = 0; i < 4; ++i) {  // r[i], r[i+4], r[i+8], r[i+12]: dword i of each 128-bit lane, 4 tokens each
    const __m512i a = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), b = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd), d = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    t[i] = _mm512_shuffle_i32x4(a, b, 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(c, d, 0x88);
    t[i + 8] = _mm512_shuffle_i32x4(a, b, 0xdd);
    t[i + 12] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

template <bool Bf16>
inline bool rounds_low_rank(const Linear& p) {
  return Bf16 && p.y_dtype == DType::bf16 && p.w->low_rank_dtype == DType::bf16;
}

// 16 dwords of one token's low-rank values from dword d: fp32, or pairs of bfloat16.
template <bool Bf16>
inline __m512i low_rank_dwords(const Linear& p, const float* token, int64_t d) {
  if constexpr (Bf16) {
    if (rounds_low_rank<true>(p)) {
      const __m512 low = _mm512_loadu_ps(token + 2 * d);
      const __m512 high = 2 * d + 16 < p.w->rank ? _mm512_loadu_ps(token + 2 * d + 16) : _mm512_setzero_ps();
      return (__m512i)_mm512_cvtne2ps_pbh(high, low);
    }
  }
  return _mm512_castps_si512(_mm512_loadu_ps(token + d));
}

constexpr int64_t kRankChunk = 16;  // dwords a transposition takes; buffers hold whole chunks

// Low-rank values of `rows` <= 16 tokens as [dword][stride], for broadcasting. Rounded up to whole chunks; each store's
// surplus lanes are overwritten by the next, so 64 bytes past the end must exist.
template <bool Bf16>
inline void pack_low_rank(const Linear& p, int64_t row, int rows, int64_t stride, int32_t* out) {
  const int64_t dwords = rounds_low_rank<Bf16>(p) ? p.w->rank / 2 : p.w->rank;
  for (int64_t d = 0; d < dwords; d += kRankChunk) {
    __m512i r[16];
    for (int i = 0; i < 16; ++i) {
      r[i] = i < rows ? low_rank_dwords<Bf16>(p, p.low_rank + (row + i) * p.w->rank, d) : _mm512_setzero_si512();
    }
    transpose16(r);
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + (d + i) * stride, r[i]);
  }
}

inline __m512 add_product(__m512 acc, __m512 up, int32_t value) {
  return _mm512_fmadd_ps(up, _mm512_castsi512_ps(_mm512_set1_epi32(value)), acc);
}

// acc[i] += sum over r of up[r] * low_rank[i][r], for a panel; low_rank as pack_low_rank leaves it.
template <int Rows, bool Bf16>
inline void add_low_rank(const Linear& p, int64_t panel, const int32_t* low_rank, int64_t stride, __m512* acc) {
  const Weight& w = *p.w;
  const uint16_t* up = w.up + panel * w.rank * kPanel;
  for (int64_t pair = 0; pair < w.rank / 2; ++pair, up += 2 * kPanel) {
    if (rounds_low_rank<Bf16>(p)) {
      if constexpr (Bf16) {
        const __m512bh both = (__m512bh)_mm512_loadu_si512(up);
        NIBBLE_UNROLL
        for (int i = 0; i < Rows; ++i) {
          acc[i] = _mm512_dpbf16_ps(acc[i], both, (__m512bh)_mm512_set1_epi32(low_rank[pair * stride + i]));
        }
      }
    } else {
      __m512 even, odd;
      load_pairs(w.low_rank_dtype, up, &even, &odd);
      NIBBLE_UNROLL
      for (int i = 0; i < Rows; ++i) acc[i] = add_product(acc[i], even, low_rank[2 * pair * stride + i]);
      NIBBLE_UNROLL
      for (int i = 0; i < Rows; ++i) acc[i] = add_product(acc[i], odd, low_rank[(2 * pair + 1) * stride + i]);
    }
  }
}

// y[row + i][panel] = acc[i] + bias, converted.
template <int Rows, bool Bf16>
inline void store_rows(const Linear& p, int64_t row, int64_t panel, const __m512* acc) {
  const Weight& w = *p.w;
  const __m512 bias = _mm512_loadu_ps(w.bias + panel * kPanel);
  const int64_t left = w.n - panel * kPanel;
  const __mmask16 mask = left >= kPanel ? 0xffff : static_cast<__mmask16>((1u << left) - 1u);
  NIBBLE_UNROLL
  for (int i = 0; i < Rows; ++i) {
    const int64_t at = (row + i) * w.n + panel * kPanel;
    const __m512 v = _mm512_add_ps(acc[i], bias);
    if (Bf16 && p.y_dtype == DType::bf16) {
      if constexpr (Bf16) {
        const __m256i h = (__m256i)_mm512_cvtneps_pbh(v);
        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(p.y) + at, mask, h);
      }
    } else {
      store16(p.y, at, p.y_dtype, v, mask);
    }
  }
}

}  // namespace
}  // namespace nibble
