// The 4-bit linear for AMX-INT8: 32 tokens x 32 outputs a tile, written against a Tiles type so that the same text runs
// on the processor's tiles and, for tests on other machines, on an emulation of them.
//
//             B0 (panel)  B1 (panel+1)     A: 16 tokens x 64 codes; B: 64 inputs x 16 outputs, 4 inputs a column
//   A0  16 x  C0          C1               C: 16 x 16 int32, one group of 64 inputs = one step
//   A1  16 x  C2          C3
//
// A group's four products are stored and promoted: acc += float(C) * scale. The promotion of group g - 1 is issued
// after the tile work of group g, so that the vector units work while the tile unit does. Weights are widened to signed
// bytes once a block of tokens, two panels at a time; tokens are copied into tiles once a block.
#pragma once
#include "kernels.h"
#include "linear_avx512.h"

namespace nibble {
namespace {

constexpr int64_t kTileRows = 16, kTileBytes = 1024, kPair = 32;
constexpr int64_t kTokenBytes = 768 << 10;  // of token codes a thread keeps near while panels pass

inline int64_t block_rows(int64_t k) {
  return max64(1, kTokenBytes / (kPair * k)) * kPair;
}
inline int64_t amx_scratch(int64_t m, int64_t k) {
  return (min64(block_rows(k), ceil_div(m, kPair) * kPair) + kPair) * k;
}

// Tiles of 16 tokens: [tile][K/64][16][64]. Tokens past the end are zero.
inline void pack_tokens(const Linear& p, Range rows, uint8_t* tiles) {
  const int64_t k = p.w->k, padded = ceil_div(rows.end - rows.begin, kPair) * kPair;
  for (int64_t i = 0; i < padded; ++i) {
    const bool real = rows.begin + i < rows.end;
    for (int64_t g = 0; g < k / kGroup; ++g) {
      uint8_t* to = tiles + (i / kTileRows) * kTileRows * k + g * kTileBytes + i % kTileRows * 64;
      const int8_t* from = p.codes + (rows.begin + i) * k + g * kGroup;
      _mm512_storeu_si512(to, real ? _mm512_loadu_si512(from) : _mm512_setzero_si512());
    }
  }
}

// One panel's codes as signed bytes: [K/64][16 steps of 4 inputs][16 outputs][4]. The panel's own order, widened.
inline void widen_panel(const Weight& w, int64_t panel, uint8_t* tiles) {
  const uint8_t* codes = w.codes + panel * w.k * kPanel / 2;
  const __m512i low_nibbles = _mm512_set1_epi8(15), eights = _mm512_set1_epi8(8);
  for (int64_t b = 0; b < w.k / 8; ++b) {
    const __m512i both = _mm512_loadu_si512(codes + b * 64);
    const __m512i lo = _mm512_and_si512(both, low_nibbles);
    const __m512i hi = _mm512_and_si512(_mm512_srli_epi16(both, 4), low_nibbles);
    _mm512_storeu_si512(tiles + b * 128, _mm512_sub_epi8(lo, eights));
    _mm512_storeu_si512(tiles + b * 128 + 64, _mm512_sub_epi8(hi, eights));
  }
}

// acc += float(products) * weight scale [* token scale], four tiles of 16 x 16.
inline void promote(const Linear& p, Range rows, Range panels, int64_t g, const int32_t* products, float* acc) {
  const int64_t groups = p.w->k / kGroup;
  for (int64_t j = 0; j < panels.end - panels.begin; ++j) {
    const __m512 scale = load16_as(p.w->scale_dtype, p.w->scales, ((panels.begin + j) * groups + g) * kPanel);
    for (int64_t i = 0; i < rows.end - rows.begin; ++i) {
      const int64_t at = ((i / kTileRows * 2 + j) * kTileRows + i % kTileRows) * kPanel;
      const bool int8 = p.mode == ActMode::int8;
      const __m512 s = int8 ? scale : _mm512_mul_ps(scale, _mm512_set1_ps(p.scales[(rows.begin + i) * groups + g]));
      const __m512 product = _mm512_cvtepi32_ps(_mm512_load_si512(products + at));
      _mm512_store_ps(acc + at, _mm512_fmadd_ps(product, s, _mm512_load_ps(acc + at)));
    }
  }
}

inline void finish_tile(const Linear& p, Range rows, Range panels, const float* acc) {
  for (int64_t j = 0; j < panels.end - panels.begin; ++j) {
    auto load = [&](int64_t row) {
      const int64_t i = row - rows.begin;
      const __m512 v = _mm512_load_ps(acc + ((i / kTileRows * 2 + j) * kTileRows + i % kTileRows) * kPanel);
      return p.mode == ActMode::int8 ? _mm512_mul_ps(v, _mm512_set1_ps(p.scales[row])) : v;
    };
    int64_t row = rows.begin;
    for (; row + 8 <= rows.end; row += 8) {
      __m512 v[8];
      for (int i = 0; i < 8; ++i) v[i] = load(row + i);
      finish<8>(p, row, panels.begin + j, v);
    }
    for (; row < rows.end; ++row) {
      __m512 v = load(row);
      finish<1>(p, row, panels.begin + j, &v);
    }
  }
}

// 32 tokens x 32 outputs over all of K. `tokens`: two token tiles a group; `weights`: two widened panels.
template <class Tiles>
void multiply_pair(Tiles& t, const Linear& p, Range rows, Range panels, const uint8_t* tokens, const uint8_t* weights) {
  alignas(64) int32_t products[2][4 * 256];
  alignas(64) float acc[4 * 256];
  for (int i = 0; i < 4 * 256; i += 16) _mm512_store_ps(acc + i, _mm512_setzero_ps());
  const int64_t groups = p.w->k / kGroup, second = kTileRows * p.w->k;
  for (int64_t g = 0; g <= groups; ++g) {
    if (g < groups) {
      t.template zero<0>(), t.template zero<1>(), t.template zero<2>(), t.template zero<3>();
      t.template load<4>(tokens + g * kTileBytes);
      t.template load<6>(weights + g * kTileBytes);
      t.template multiply<0, 4, 6>();
      t.template load<7>(weights + second + g * kTileBytes);
      t.template multiply<1, 4, 7>();
      t.template load<5>(tokens + second + g * kTileBytes);
      t.template multiply<2, 5, 6>();
      t.template multiply<3, 5, 7>();
      int32_t* to = products[g % 2];
      t.template store<0>(to), t.template store<1>(to + 256), t.template store<2>(to + 512),
          t.template store<3>(to + 768);
    }
    if (g > 0) promote(p, rows, panels, g - 1, products[(g - 1) % 2], acc);
  }
  finish_tile(p, rows, panels, acc);
}

template <class Tiles>
void linear_tiles(const Linear& p, Range rows, Range panels, uint8_t* scratch) {
  Tiles tiles;
  const int64_t k = p.w->k, block = block_rows(k);
  uint8_t *weights = scratch, *tokens = scratch + kPair * k;
  for (int64_t first = rows.begin; first < rows.end; first += block) {
    const int64_t last = min64(first + block, rows.end);
    pack_tokens(p, {first, last}, tokens);
    for (int64_t panel = panels.begin; panel < panels.end; panel += 2) {
      const Range pair{panel, min64(panel + 2, panels.end)};
      // A missing second panel repeats the first: its products are never promoted.
      widen_panel(*p.w, panel, weights);
      widen_panel(*p.w, pair.end - 1, weights + kTileRows * k);
      for (int64_t row = first; row < last; row += kPair) {
        multiply_pair(tiles, p, {row, min64(row + kPair, last)}, pair, tokens + (row - first) * k, weights);
      }
    }
  }
}

}  // namespace
}  // namespace nibble
