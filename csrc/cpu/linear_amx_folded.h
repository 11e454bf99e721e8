// The 4-bit linear for AMX-INT8 with many tokens and 8-bit activations: group scales are folded into 8-bit weights, so
// that the tile unit sums over all of K and nothing is promoted on the way.
//
// By count of instructions, promoting four tiles after each 64 inputs keeps the vector units busy for longer than the
// products keep the tile unit.
// Here a weight becomes round(code * scale / step), with step = 8 * max|scale| / 127 of its output over all groups:
// half a step beside the half of a scale that 4 bits cost. Panels are folded once a block of tokens, as many as stay in
// the second cache; tokens pass them 32 at a time.
#pragma once
#include "linear_amx.h"

namespace nibble {
namespace {

constexpr int64_t kFoldedFrom = 256;            // tokens; for fewer, folding takes longer than it saves
constexpr int64_t kFoldedTokenBytes = 8 << 20;  // of token codes a thread lays out as tiles at once
constexpr int64_t kFoldedPanelBytes = 5 << 18;  // of folded weights a thread keeps near while tokens pass
constexpr float kFixedPoint = 127 * 16 * 16;    // of the largest scale: |code| * it * 16 >> 15 is 127 at most
constexpr float kLeastScale = 0x1p-100f;        // keeps the division finite; weights this small do not count

inline bool folds(const Linear& p) {
  return p.mode == ActMode::int8 && p.m >= kFoldedFrom;
}
inline int64_t folded_rows(int64_t k) {
  return max64(1, kFoldedTokenBytes / (kPair * k)) * kPair;
}
inline int64_t folded_panels(int64_t k) {
  return max64(2, kFoldedPanelBytes / (kPanel * k) / 2 * 2);
}

// Scratch memory of a thread: folded panels with their steps, then for each 32 tokens of a block their tiles and
// low-rank values.
inline int64_t folded_bytes(const Weight& w) {
  return folded_panels(w.k) * kPanel * (w.k + 4);
}
inline int64_t folded_scratch(const Weight& w, int64_t m) {
  return folded_bytes(w) + min64(folded_rows(w.k) / kPair, ceil_div(m, kPair)) * pair_bytes(w);
}

// Four bits of each 16-bit lane, moved to its top, as code * 16.
inline __m512i code_times_16(__m512i at_top) {
  constexpr int kAndXor = 0x6a;  // (a & b) ^ c
  const __m512i nibble = _mm512_set1_epi16(static_cast<int16_t>(0xf000)),
                sign = _mm512_set1_epi16(static_cast<int16_t>(0x8000));
  return _mm512_srai_epi16(_mm512_ternarylogic_epi32(at_top, nibble, sign, kAndXor), 8);
}

// The low bytes of two vectors' 16-bit lanes, side by side.
inline __m512i low_bytes(__m512i even, __m512i odd) {
  constexpr int kAndOr = 0xea;  // (a & b) | c
  return _mm512_ternarylogic_epi32(even, _mm512_set1_epi16(0xff), _mm512_slli_epi16(odd, 8), kAndOr);
}

// One panel's weights as signed bytes in widen_panel's order, and the step of each of its outputs.
inline void fold_panel(const Weight& w, int64_t panel, uint8_t* tiles, float* steps) {
  const int64_t groups = w.k / kGroup, scales = panel * groups * kPanel;
  __m512 most = _mm512_set1_ps(kLeastScale);
  for (int64_t g = 0; g < groups; ++g)
    most = _mm512_max_ps(most, _mm512_abs_ps(load16_as(w.scale_dtype, w.scales, scales + g * kPanel)));
  _mm512_storeu_ps(steps, _mm512_mul_ps(most, _mm512_set1_ps(8.0f / 127.0f)));
  const __m512 per_scale = _mm512_div_ps(_mm512_set1_ps(kFixedPoint), most);
  const uint8_t* codes = w.codes + panel * w.k * kPanel / 2;
  for (int64_t g = 0; g < groups; ++g) {
    const __m512 scale = load16_as(w.scale_dtype, w.scales, scales + g * kPanel);
    const __m512i fixed = _mm512_cvtps_epi32(_mm512_mul_ps(scale, per_scale));
    const __m512i factor = _mm512_or_si512(_mm512_slli_epi32(fixed, 16),
                                           _mm512_and_si512(fixed, _mm512_set1_epi32(0xffff)));  // twice, 16 bits each
    for (int64_t b = g * kGroup / 8; b < (g + 1) * kGroup / 8; ++b) {
      const __m512i both = _mm512_loadu_si512(codes + b * 64);
      const __m512i lo0 = _mm512_mulhrs_epi16(code_times_16(_mm512_slli_epi16(both, 12)), factor);
      const __m512i lo1 = _mm512_mulhrs_epi16(code_times_16(_mm512_slli_epi16(both, 4)), factor);
      const __m512i hi0 = _mm512_mulhrs_epi16(code_times_16(_mm512_slli_epi16(both, 8)), factor);
      const __m512i hi1 = _mm512_mulhrs_epi16(code_times_16(both), factor);
      _mm512_storeu_si512(tiles + b * 128, low_bytes(lo0, lo1));
      _mm512_storeu_si512(tiles + b * 128 + 64, low_bytes(hi0, hi1));
    }
  }
}

// 32 tokens x 32 outputs over all of K. `tokens` as pack_tokens leaves them; two folded panels and where each one's
// weights and steps lie.
struct Folded {
  const uint8_t* weights[2];
  const float* steps[2];
};
template <class Tiles>
void multiply_folded(Tiles& t, const Linear& p, Range rows, Range panels, const uint8_t* tokens, const Folded& f) {
  alignas(64) int32_t products[4 * 256];
  alignas(64) float acc[4 * 256];
  const int64_t groups = p.w->k / kGroup, second = kTileRows * p.w->k;
  t.template zero<0>(), t.template zero<1>(), t.template zero<2>(), t.template zero<3>();
  for (int64_t g = 0; g < groups; ++g) {
    t.template load<4>(tokens + g * kTileBytes);
    t.template load<6>(f.weights[0] + g * kTileBytes);
    t.template multiply<0, 4, 6>();
    t.template load<7>(f.weights[1] + g * kTileBytes);
    t.template multiply<1, 4, 7>();
    t.template load<5>(tokens + second + g * kTileBytes);
    t.template multiply<2, 5, 6>();
    t.template multiply<3, 5, 7>();
  }
  t.template store<0>(products), t.template store<1>(products + 256), t.template store<2>(products + 512),
      t.template store<3>(products + 768);
  for (int tile = 0; tile < 4; ++tile) {
    const __m512 step = _mm512_loadu_ps(f.steps[tile % 2]);
    for (int i = tile * 256; i < (tile + 1) * 256; i += kPanel)
      _mm512_store_ps(acc + i, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(products + i)), step));
  }
  finish_pair(p, rows, panels, acc, reinterpret_cast<const int32_t*>(tokens + kPair * p.w->k));
}

template <class Tiles>
void linear_folded(const Linear& p, Range rows, Range panels, uint8_t* scratch) {
  Tiles tiles;
  const Weight& w = *p.w;
  const int64_t block = folded_rows(w.k), near = folded_panels(w.k);
  float* steps = reinterpret_cast<float*>(scratch + near * kPanel * w.k);
  uint8_t* packed = scratch + folded_bytes(w);
  for (int64_t first = rows.begin; first < rows.end; first += block) {
    const int64_t last = min64(first + block, rows.end);
    auto pair_of = [&](int64_t row) { return Range{row, min64(row + kPair, last)}; };
    auto tokens_of = [&](int64_t row) { return packed + (row - first) / kPair * pair_bytes(w); };
    for (int64_t row = first; row < last; row += kPair) pack_tokens(p, pair_of(row), tokens_of(row));
    for (int64_t panel = panels.begin; panel < panels.end; panel += near) {
      const int64_t end = min64(panel + near, panels.end);
      auto at = [&](int64_t i) { return scratch + (i - panel) * kPanel * w.k; };
      auto steps_of = [&](int64_t i) { return steps + (i - panel) * kPanel; };
      for (int64_t i = panel; i < end; ++i) fold_panel(w, i, at(i), steps_of(i));
      for (int64_t row = first; row < last; row += kPair) {
        for (int64_t i = panel; i < end; i += 2) {
          // A missing second panel repeats the first; its sums are dropped.
          const int64_t other = min64(i + 1, end - 1);
          const Folded f{{at(i), at(other)}, {steps_of(i), steps_of(other)}};
          multiply_folded(tiles, p, pair_of(row), Range{i, min64(i + 2, end)}, tokens_of(row), f);
        }
      }
    }
  }
}

}  // namespace
}  // namespace nibble
