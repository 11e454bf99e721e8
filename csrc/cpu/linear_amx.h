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
#include "finish_avx512.h"
#include "kernels.h"

namespace nibble {
namespace {

constexpr int64_t kTileRows = 16, kTileBytes = 1024, kPair = 32;
constexpr int64_t kTokenBytes = 768 << 10;  // of token codes a thread keeps near while panels pass

inline int64_t block_rows(int64_t k) {
  return max64(1, kTokenBytes / (kPair * k)) * kPair;
}

// Scratch memory of a thread: two widened panels, then for each 32 tokens of a block their tiles and low-rank values.
inline int64_t pair_bytes(const Weight& w) {
  return kPair * (w.k + w.rank * 4) + 64;
}
inline int64_t amx_scratch(const Weight& w, int64_t m) {
  return kPair * w.k + min64(block_rows(w.k) / kPair, ceil_div(m, kPair)) * pair_bytes(w);
}

// Up to 32 tokens as two runs of tiles, [2][K/64][16][64], zero past the end; then their low-rank values, [R/2][32].
inline void pack_tokens(const Linear& p, Range rows, uint8_t* tiles) {
  const int64_t k = p.w->k, count = rows.end - rows.begin;
  for (int64_t i = 0; i < kPair; ++i) {
    for (int64_t g = 0; g < k / kGroup; ++g) {
      uint8_t* to = tiles + i / kTileRows * kTileRows * k + g * kTileBytes + i % kTileRows * 64;
      const int8_t* from = p.codes + (rows.begin + i) * k + g * kGroup;
      _mm512_storeu_si512(to, i < count ? _mm512_loadu_si512(from) : _mm512_setzero_si512());
    }
  }
  int32_t* low_rank = reinterpret_cast<int32_t*>(tiles + kPair * k);
  pack_low_rank<true>(p, rows.begin, static_cast<int>(min64(count, 16)), kPair, low_rank);
  if (count > 16) pack_low_rank<true>(p, rows.begin + 16, static_cast<int>(count - 16), kPair, low_rank + 16);
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

// acc += float(products) * weight scale [* token scale], for the C tiles of `rows` x `panels`.
template <bool PerGroup>
inline void promote(const Linear& p, Range rows, Range panels, int64_t g, const int32_t* products, float* acc) {
  const int64_t groups = p.w->k / kGroup;
  for (int64_t j = 0; j < panels.end - panels.begin; ++j) {
    const __m512 scale = load16_as(p.w->scale_dtype, p.w->scales, ((panels.begin + j) * groups + g) * kPanel);
    for (int64_t row = rows.begin, at = j * kTileRows * kPanel; row < rows.end;
         row += kTileRows, at += kTileBytes / 2) {
      const int64_t count = min64(kTileRows, rows.end - row);
      for (int64_t i = 0; i < count; ++i) {
        const __m512 s = PerGroup ? _mm512_mul_ps(scale, _mm512_set1_ps(p.scales[(row + i) * groups + g])) : scale;
        const __m512 product = _mm512_cvtepi32_ps(_mm512_load_si512(products + at + i * kPanel));
        float* sum = acc + at + i * kPanel;
        _mm512_store_ps(sum, _mm512_fmadd_ps(product, s, _mm512_load_ps(sum)));
      }
    }
  }
}

// Low-rank branch, bias and conversion of tokens [row, row + Rows), whose sums lie at `acc`.
template <int Rows>
inline void finish(const Linear& p, int64_t row, int64_t panel, const float* acc, const int32_t* low_rank) {
  __m512 v[Rows];
  NIBBLE_UNROLL
  for (int i = 0; i < Rows; ++i) {
    v[i] = _mm512_load_ps(acc + i * kPanel);
    if (p.mode == ActMode::int8) v[i] = _mm512_mul_ps(v[i], _mm512_set1_ps(p.scales[row + i]));
  }
  add_low_rank<Rows, true>(p, panel, low_rank, kPair, v);
  store_rows<Rows, true>(p, row, panel, v);
}

inline void finish_pair(const Linear& p, Range rows, Range panels, const float* acc, const int32_t* low_rank) {
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    for (int64_t i = 0; i < rows.end - rows.begin;) {
      const float* sums = acc + ((i / kTileRows * 2 + panel - panels.begin) * kTileRows + i % kTileRows) * kPanel;
      if (i + 8 <= rows.end - rows.begin) {
        finish<8>(p, rows.begin + i, panel, sums, low_rank + i);
        i += 8;
      } else {
        finish<1>(p, rows.begin + i, panel, sums, low_rank + i);
        i += 1;
      }
    }
  }
}

// 32 tokens x 32 outputs over all of K. `tokens` as pack_tokens leaves them; `weights`: two widened panels.
template <class Tiles, bool PerGroup>
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
    if (g > 0) promote<PerGroup>(p, rows, panels, g - 1, products[(g - 1) % 2], acc);
  }
  finish_pair(p, rows, panels, acc, reinterpret_cast<const int32_t*>(tokens + kPair * p.w->k));
}

template <class Tiles>
void linear_tiles(const Linear& p, Range rows, Range panels, uint8_t* scratch) {
  Tiles tiles;
  const Weight& w = *p.w;
  const auto multiply = p.mode == ActMode::int8 ? multiply_pair<Tiles, false> : multiply_pair<Tiles, true>;
  const int64_t block = block_rows(w.k);
  for (int64_t first = rows.begin; first < rows.end; first += block) {
    const int64_t last = min64(first + block, rows.end);
    auto pair_of = [&](int64_t row) { return Range{row, min64(row + kPair, last)}; };
    auto tokens_of = [&](int64_t row) { return scratch + kPair * w.k + (row - first) / kPair * pair_bytes(w); };
    for (int64_t row = first; row < last; row += kPair) pack_tokens(p, pair_of(row), tokens_of(row));
    for (int64_t panel = panels.begin; panel < panels.end; panel += 2) {
      const Range pair{panel, min64(panel + 2, panels.end)};
      // A missing second panel repeats the first: its products are never promoted.
      widen_panel(w, panel, scratch);
      widen_panel(w, pair.end - 1, scratch + kTileRows * w.k);
      for (int64_t row = first; row < last; row += kPair)
        multiply(tiles, p, pair_of(row), pair, tokens_of(row), scratch);
    }
  }
}

}  // namespace
}  // namespace nibble
