// The 4-bit linear for AVX-512 VNNI: 1 to 14 tokens x 16 outputs a tile.
//
// vpdpbusd multiplies unsigned by signed bytes. The stored weight codes are code + 8, so they are the unsigned side
// straight from the nibbles, and the tokens' signed codes are broadcast from memory four at a time. The 8 is taken
// back by starting each group's integer sum at -8 * (sum of the token's codes in the group) instead of at zero:
//
//     64 bytes of weights             tokens, [K/4][tile] of 4 codes      sums, [K/64][tile]
//     lo = v & 15   inputs 8b..8b+3   dot[t] += lo * act[2b][t]           dot[t] starts at -8 * sum
//     hi = v >> 4   inputs 8b+4..+7   dot[t] += hi * act[2b+1][t]         acc[t] += float(dot[t]) * scale[16]
//
// The tokens of a block are first transposed into [K/4][tile], which keeps the inner loop free of strides (rows that
// lie 4096 bytes apart would share one cache set) and gives the sums on the way. A block of tiles stays in the second
// cache while the weight panels pass by once.
#pragma once
#include "finish_avx512.h"
#include "kernels.h"

namespace nibble {
namespace {

constexpr int kTile = 14;                   // 14 integer and 14 fp32 sums, 2 weights, mask, scale: 32 registers
constexpr int64_t kBlockBytes = 384 << 10;  // of token codes a thread keeps near while panels pass

inline int64_t tiles_per_block(int64_t k) {
  return max64(1, kBlockBytes / (kTile * k));
}

// The packed tokens of a tile lie one array after another in its part of the scratch memory, each with room for the
// surplus lanes of its last 64-byte store.
struct Tile {
  int32_t* act;       // [K/4][rows]
  int32_t* sums;      // [K/64][rows]
  int32_t* low_rank;  // [R or R/2][rows]
  int64_t row;        // first token
  int rows;

  static int64_t bytes(const Weight& w) { return kTile * (w.k + w.k / kGroup * 4 + w.rank * 4) + 3 * 64; }
  Tile(const Weight& w, uint8_t* memory, Range tokens)
      : act(reinterpret_cast<int32_t*>(memory)),
        sums(act + kTile * (w.k / 4) + 16),
        low_rank(sums + kTile * (w.k / kGroup) + 16),
        row(tokens.begin),
        rows(static_cast<int>(tokens.end - tokens.begin)) {}
};

template <bool Bf16>
void pack_tile(const Linear& p, const Tile& tile) {
  pack_low_rank<Bf16>(p, tile.row, tile.rows, tile.rows, tile.low_rank);
  const int64_t k = p.w->k;
  const __m512i eights = _mm512_set1_epi8(8);
  for (int64_t g = 0; g < k / kGroup; ++g) {
    __m512i r[16];
    for (int i = 0; i < 16; ++i) {
      r[i] = i < tile.rows ? _mm512_loadu_si512(p.codes + (tile.row + i) * k + g * kGroup) : _mm512_setzero_si512();
    }
    transpose16(r);
    __m512i sum = _mm512_setzero_si512();
    for (int i = 0; i < 16; ++i) {  // each store's surplus lanes are overwritten by the next
      sum = _mm512_dpbusd_epi32(sum, eights, r[i]);
      _mm512_storeu_si512(tile.act + (g * 16 + i) * tile.rows, r[i]);
    }
    _mm512_storeu_si512(tile.sums + g * tile.rows, _mm512_sub_epi32(_mm512_setzero_si512(), sum));
  }
}

template <bool Bf16, int Rows, bool PerGroup>
void multiply(const Linear& p, const Tile& tile, int64_t panel) {
  const Weight& w = *p.w;
  const int64_t groups = w.k / kGroup;
  const uint8_t* codes = w.codes + panel * w.k * kPanel / 2;
  const uint16_t* scales = w.scales + panel * groups * kPanel;
  const float* act_scales = p.scales + tile.row * (PerGroup ? groups : 1);
  const int32_t* act = tile.act;
  const __m512i low_nibbles = _mm512_set1_epi8(15);
  __m512 acc[Rows];
  NIBBLE_UNROLL
  for (int i = 0; i < Rows; ++i) acc[i] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; ++g) {
    __m512i dot[Rows];
    NIBBLE_UNROLL
    for (int i = 0; i < Rows; ++i) dot[i] = _mm512_set1_epi32(tile.sums[g * Rows + i]);
    NIBBLE_UNROLL
    for (int b = 0; b < 8; ++b, codes += 64, act += 2 * Rows) {
      const __m512i both = _mm512_loadu_si512(codes);
      const __m512i lo = _mm512_and_si512(both, low_nibbles);
      const __m512i hi = _mm512_and_si512(_mm512_srli_epi16(both, 4), low_nibbles);
      NIBBLE_UNROLL
      for (int i = 0; i < Rows; ++i) dot[i] = _mm512_dpbusd_epi32(dot[i], lo, _mm512_set1_epi32(act[i]));
      NIBBLE_UNROLL
      for (int i = 0; i < Rows; ++i) dot[i] = _mm512_dpbusd_epi32(dot[i], hi, _mm512_set1_epi32(act[Rows + i]));
    }
    const __m512 scale = load16_as(w.scale_dtype, scales, g * kPanel);
    NIBBLE_UNROLL
    for (int i = 0; i < Rows; ++i) {
      const __m512 s = PerGroup ? _mm512_mul_ps(scale, _mm512_set1_ps(act_scales[i * groups + g])) : scale;
      acc[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[i]), s, acc[i]);
    }
  }
  if (!PerGroup) {
    NIBBLE_UNROLL
    for (int i = 0; i < Rows; ++i) acc[i] = _mm512_mul_ps(acc[i], _mm512_set1_ps(act_scales[i]));
  }
  add_low_rank<Rows, Bf16>(p, panel, tile.low_rank, Rows, acc);
  store_rows<Rows, Bf16>(p, tile.row, panel, acc);
}

using Multiply = void (*)(const Linear&, const Tile&, int64_t panel);
#define NIBBLE_ROWS(n) {multiply<Bf16, n, false>, multiply<Bf16, n, true>}
template <bool Bf16>
constexpr Multiply kMultiply[kTile][2] = {
    NIBBLE_ROWS(1), NIBBLE_ROWS(2), NIBBLE_ROWS(3),  NIBBLE_ROWS(4),  NIBBLE_ROWS(5),  NIBBLE_ROWS(6),  NIBBLE_ROWS(7),
    NIBBLE_ROWS(8), NIBBLE_ROWS(9), NIBBLE_ROWS(10), NIBBLE_ROWS(11), NIBBLE_ROWS(12), NIBBLE_ROWS(13), NIBBLE_ROWS(14),
};
#undef NIBBLE_ROWS

inline int64_t vnni_scratch(const Weight& w, int64_t m) {
  return min64(tiles_per_block(w.k), ceil_div(m, kTile)) * Tile::bytes(w);
}

template <bool Bf16>
void linear_vnni(const Linear& p, Range rows, Range panels, uint8_t* scratch) {
  const Weight& w = *p.w;
  const int64_t count = rows.end - rows.begin, tiles = ceil_div(count, kTile), block = tiles_per_block(w.k);
  auto tile_of = [&](int64_t t) {
    // Tiles of nearly equal height: 128 tokens become 8 x 13 + 2 x 12 rather than 9 x 14 + 2.
    const Range tokens{rows.begin + count * t / tiles, rows.begin + count * (t + 1) / tiles};
    return Tile(w, scratch + t % block * Tile::bytes(w), tokens);
  };
  for (int64_t first = 0; first < tiles; first += block) {
    const int64_t last = min64(first + block, tiles);
    for (int64_t t = first; t < last; ++t) pack_tile<Bf16>(p, tile_of(t));
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      for (int64_t t = first; t < last; ++t) {
        const Tile tile = tile_of(t);
        kMultiply<Bf16>[tile.rows - 1][p.mode != ActMode::int8](p, tile, panel);
      }
    }
  }
}

}  // namespace
}  // namespace nibble
