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
#include "linear_avx512.h"

#include "kernels.h"

namespace nibble {
namespace {

constexpr int kTile = 14;                   // 14 integer and 14 fp32 sums, 2 weights, mask, scale: 32 registers
constexpr int64_t kBlockBytes = 384 << 10;  // of token codes a thread keeps near while panels pass

int64_t tiles_per_block(int64_t k) {
  return max64(1, kBlockBytes / (kTile * k));
}
// One tile of codes, with room for the last 64-byte store, then its sums.
int64_t tile_stride(int64_t k) {
  return kTile * k + 64 + kTile * (k / kGroup) * 4 + 64;
}

struct Tile {
  int32_t* act;   // [K/4][rows]
  int32_t* sums;  // [K/64][rows]
  int64_t row;    // first token
  int rows;
};

// rows[i] holds 16 dwords of token i; afterwards rows[j] holds dword j of the 16 tokens.
inline void transpose16(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  }
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

void pack_tile(const Linear& p, const Tile& tile) {
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

// dot += weights (unsigned) * four codes (signed) broadcast from memory. As assembly: given the intrinsic, GCC 12 loads
// the codes apart from the product, and the registers this takes push the fp32 sums onto the stack (a quarter slower).
inline void add_products(__m512i& dot, __m512i weights, const int32_t& codes) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(dot) : "v"(weights), "m"(codes));
}

template <int Rows, bool PerGroup>
void multiply(const Linear& p, const Tile& tile, int64_t panel) {
  const Weight& w = *p.w;
  const int64_t groups = w.k / kGroup;
  const uint8_t* codes = w.codes + panel * w.k * kPanel / 2;
  const uint16_t* scales = w.scales + panel * groups * kPanel;
  const float* act_scales = p.scales + tile.row * (PerGroup ? groups : 1);
  const int32_t* act = tile.act;
  const __m512i low_nibbles = _mm512_set1_epi8(15);
  __m512 acc[Rows];
  for (int i = 0; i < Rows; ++i) acc[i] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; ++g) {
    __m512i dot[Rows];
    for (int i = 0; i < Rows; ++i) dot[i] = _mm512_set1_epi32(tile.sums[g * Rows + i]);
#pragma GCC unroll 8
    for (int b = 0; b < 8; ++b, codes += 64, act += 2 * Rows) {
      const __m512i both = _mm512_loadu_si512(codes);
      const __m512i lo = _mm512_and_si512(both, low_nibbles);
      const __m512i hi = _mm512_and_si512(_mm512_srli_epi16(both, 4), low_nibbles);
      for (int i = 0; i < Rows; ++i) add_products(dot[i], lo, act[i]);
      for (int i = 0; i < Rows; ++i) add_products(dot[i], hi, act[Rows + i]);
    }
    const __m512 scale = load16_as(w.scale_dtype, scales, g * kPanel);
    for (int i = 0; i < Rows; ++i) {
      const __m512 s = PerGroup ? _mm512_mul_ps(scale, _mm512_set1_ps(act_scales[i * groups + g])) : scale;
      acc[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[i]), s, acc[i]);
    }
  }
  if (!PerGroup)
    for (int i = 0; i < Rows; ++i) acc[i] = _mm512_mul_ps(acc[i], _mm512_set1_ps(act_scales[i]));
  finish<Rows>(p, tile.row, panel, acc);
}

using Multiply = void (*)(const Linear&, const Tile&, int64_t panel);
#define NIBBLE_ROWS(n) {multiply<n, false>, multiply<n, true>}
constexpr Multiply kMultiply[kTile][2] = {
    NIBBLE_ROWS(1), NIBBLE_ROWS(2), NIBBLE_ROWS(3),  NIBBLE_ROWS(4),  NIBBLE_ROWS(5),  NIBBLE_ROWS(6),  NIBBLE_ROWS(7),
    NIBBLE_ROWS(8), NIBBLE_ROWS(9), NIBBLE_ROWS(10), NIBBLE_ROWS(11), NIBBLE_ROWS(12), NIBBLE_ROWS(13), NIBBLE_ROWS(14),
};
#undef NIBBLE_ROWS

}  // namespace

int64_t linear_scratch_avx512(int64_t m, int64_t k) {
  return min64(tiles_per_block(k), ceil_div(m, kTile)) * tile_stride(k);
}

void linear_avx512(const Linear& p, Range rows, Range panels, uint8_t* scratch) {
  const int64_t k = p.w->k, count = rows.end - rows.begin, tiles = ceil_div(count, kTile), block = tiles_per_block(k);
  // Tiles of nearly equal height: 128 tokens become 8 x 13 + 2 x 12 rather than 9 x 14 + 2.
  auto row_of = [&](int64_t t) { return rows.begin + count * t / tiles; };
  auto tile_of = [&](int64_t t) {
    uint8_t* at = scratch + t % block * tile_stride(k);
    int32_t* sums = reinterpret_cast<int32_t*>(at + kTile * k + 64);
    return Tile{reinterpret_cast<int32_t*>(at), sums, row_of(t), static_cast<int>(row_of(t + 1) - row_of(t))};
  };
  for (int64_t first = 0; first < tiles; first += block) {
    const int64_t last = min64(first + block, tiles);
    for (int64_t t = first; t < last; ++t) pack_tile(p, tile_of(t));
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      for (int64_t t = first; t < last; ++t) {
        const Tile tile = tile_of(t);
        kMultiply[tile.rows - 1][p.mode != ActMode::int8](p, tile, panel);
      }
    }
  }
}

}  // namespace nibble
