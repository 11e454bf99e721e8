// The 4-bit linear for AVX2: 1 to 4 tokens x 8 outputs (half a panel) a tile.
//
// vpmaddubsw multiplies unsigned weight codes (code + 8, 0..15) by signed token codes and adds pairs in 16 bits. A pair
// is at most 2 * 15 * 128 = 3840 in size, so 8 of them (half a group) fit in 16 bits; then vpmaddwd widens. The 8 is
// taken back by starting each group's integer sum at -8 * (sum of the token's codes in the group).
#include "avx2.h"
#include "kernels.h"

namespace nibble {
namespace {

constexpr int kTile = 4;    // 4 sums each of 16 bits, 32 bits and fp32, 2 weights, mask, ones: 16 registers
constexpr int kBlock = 32;  // tokens that meet a weight panel while it is in the cache

// sums [rows][K/64]: -8 * the sum of a group's codes.
void group_sums(const Linear& p, Range rows, int32_t* sums) {
  const int64_t groups = p.w->k / kGroup;
  for (int64_t i = 0; i < (rows.end - rows.begin) * groups; ++i) {
    int32_t sum = 0;
    for (int64_t j = 0; j < kGroup; ++j) sum += p.codes[rows.begin * p.w->k + i * kGroup + j];
    sums[i] = -8 * sum;
  }
}

template <int Rows>
inline void finish(const Linear& p, int64_t row, int64_t panel, int half, __m256* acc) {
  const Weight& w = *p.w;
  for (int64_t r = 0; r < w.rank; r += 2) {
    __m256 even, odd;
    load_pairs(w.low_rank_dtype, w.up + ((panel * w.rank + r) / 2 * kPanel + 8 * half) * 2, &even, &odd);
    NIBBLE_UNROLL
    for (int i = 0; i < Rows; ++i) {
      const float* low_rank = p.low_rank + (row + i) * w.rank + r;
      acc[i] =
          _mm256_fmadd_ps(odd, _mm256_set1_ps(low_rank[1]), _mm256_fmadd_ps(even, _mm256_set1_ps(low_rank[0]), acc[i]));
    }
  }
  const int64_t n = panel * kPanel + 8 * half;
  const __m256 bias = _mm256_loadu_ps(w.bias + n);
  NIBBLE_UNROLL
  for (int i = 0; i < Rows; ++i) {
    store8(p.y, (row + i) * w.n + n, p.y_dtype, _mm256_add_ps(acc[i], bias), w.n - n);
  }
}

template <int Rows>
void multiply(const Linear& p, int64_t row, const int32_t* sums, int64_t panel, int half) {
  const Weight& w = *p.w;
  const int64_t groups = w.k / kGroup;
  const bool per_group = p.mode != ActMode::int8;
  const uint8_t* codes = w.codes + panel * w.k * kPanel / 2 + 32 * half;
  const int8_t* act = p.codes + row * w.k;
  const __m256i low_nibbles = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  __m256 acc[Rows];
  NIBBLE_UNROLL
  for (int i = 0; i < Rows; ++i) acc[i] = _mm256_setzero_ps();
  for (int64_t g = 0; g < groups; ++g) {
    __m256i dot[Rows];
    NIBBLE_UNROLL
    for (int i = 0; i < Rows; ++i) dot[i] = _mm256_set1_epi32(sums[i * groups + g]);
    for (int part = 0; part < 2; ++part) {
      __m256i words[Rows];
      NIBBLE_UNROLL
      for (int i = 0; i < Rows; ++i) words[i] = _mm256_setzero_si256();
      for (int b = 0; b < 4; ++b, codes += 64, act += 8) {
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
        const __m256i lo = _mm256_and_si256(both, low_nibbles);
        const __m256i hi = _mm256_and_si256(_mm256_srli_epi16(both, 4), low_nibbles);
        NIBBLE_UNROLL
        for (int i = 0; i < Rows; ++i) {
          int32_t first, second;
          memcpy(&first, act + i * w.k, 4);
          memcpy(&second, act + i * w.k + 4, 4);
          words[i] = _mm256_add_epi16(words[i], _mm256_maddubs_epi16(lo, _mm256_set1_epi32(first)));
          words[i] = _mm256_add_epi16(words[i], _mm256_maddubs_epi16(hi, _mm256_set1_epi32(second)));
        }
      }
      NIBBLE_UNROLL
      for (int i = 0; i < Rows; ++i) dot[i] = _mm256_add_epi32(dot[i], _mm256_madd_epi16(words[i], ones));
    }
    const __m256 scale = load8_as(w.scale_dtype, w.scales, (panel * groups + g) * kPanel + 8 * half);
    NIBBLE_UNROLL
    for (int i = 0; i < Rows; ++i) {
      const __m256 s = per_group ? _mm256_mul_ps(scale, _mm256_set1_ps(p.scales[(row + i) * groups + g])) : scale;
      acc[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[i]), s, acc[i]);
    }
  }
  if (!per_group) {
    NIBBLE_UNROLL
    for (int i = 0; i < Rows; ++i) acc[i] = _mm256_mul_ps(acc[i], _mm256_set1_ps(p.scales[row + i]));
  }
  finish<Rows>(p, row, panel, half, acc);
}

using Multiply = void (*)(const Linear&, int64_t row, const int32_t* sums, int64_t panel, int half);
constexpr Multiply kMultiply[kTile] = {multiply<1>, multiply<2>, multiply<3>, multiply<4>};

}  // namespace

int64_t linear_scratch_avx2(const Weight& w, int64_t) {
  return kBlock * (w.k / kGroup) * 4;
}

void linear_avx2(const Linear& p, Range rows, Range panels, uint8_t* scratch) {
  int32_t* sums = reinterpret_cast<int32_t*>(scratch);
  const int64_t groups = p.w->k / kGroup;
  for (int64_t first = rows.begin; first < rows.end; first += kBlock) {
    const int64_t last = min64(first + kBlock, rows.end);
    group_sums(p, {first, last}, sums);
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      for (int64_t row = first; row < last; row += kTile) {
        const Multiply multiply = kMultiply[min64(kTile, last - row) - 1];
        for (int half = 0; half < 2; ++half) {
          if (panel * kPanel + 8 * half < p.w->n) multiply(p, row, sums + (row - first) * groups, panel, half);
        }
      }
    }
  }
}

}  // namespace nibble
