// Activation quantization, AVX2. A tile of tokens is read from memory once: the low-rank product reads it first, the
// quantization then finds it in the cache.
#include "avx2.h"
#include "kernels.h"

namespace nibble {
namespace {

constexpr int kRows = 4;  // 4 x 2 sums, 4 weight and 2 token registers of 16

template <DType X>
inline __m256 smoothed8(const void* row, const float* inv_smooth, int64_t k, bool shift) {
  __m256 v = load8<X>(row, k);
  if (shift) v = _mm256_add_ps(v, _mm256_set1_ps(kUnsignedShift));
  return _mm256_mul_ps(v, _mm256_loadu_ps(inv_smooth + k));
}

inline uint32_t reduce_max(__m256i v) {
  __m128i m = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
}

// Inputs [0, count) of one run that shares a scale: writes codes, returns the scale.
template <DType X>
float quantize_run(const void* row, const float* inv_smooth, int64_t count, ActMode mode, int8_t* codes) {
  const bool shift = mode == ActMode::uint4;
  const float levels = levels_of(mode);
  const __m256i clear_sign = _mm256_set1_epi32(0x7fffffff);
  __m256i largest = _mm256_setzero_si256();  // magnitudes as integers: NaN is the largest, so it reaches the scale
  for (int64_t k = 0; k < count; k += 8) {
    const __m256i bits = _mm256_castps_si256(smoothed8<X>(row, inv_smooth, k, shift));
    largest = _mm256_max_epu32(largest, _mm256_and_si256(bits, clear_sign));
  }
  const uint32_t top = reduce_max(largest);
  const float m = bits_to_float(top);
  if (!(m >= kTinyMax) || top >= 0x7f800000u) {
    memset(codes, 0, static_cast<size_t>(count));
    return m < kTinyMax ? 0.0f : m * (1.0f / levels);
  }
  const __m256 inverse = _mm256_set1_ps(levels / m);
  const __m128i lowest = _mm_set1_epi16(shift ? 0 : mode == ActMode::int4 ? -8 : -127);
  for (int64_t k = 0; k < count; k += 8) {
    const __m256i q = _mm256_cvtps_epi32(_mm256_mul_ps(smoothed8<X>(row, inv_smooth, k, shift), inverse));
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
    words = _mm_max_epi16(words, lowest);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + k), _mm_packs_epi16(words, words));
  }
  return m * (1.0f / levels);
}

template <DType X>
void quantize_token(const QuantizeAct& p, int64_t row) {
  const int64_t k = p.w->k, run = p.mode == ActMode::int8 ? k : kGroup;
  const char* x = static_cast<const char*>(p.x) + row * p.x_stride * size_of(X);
  for (int64_t at = 0; at < k; at += run) {
    const float scale = quantize_run<X>(x + at * size_of(X), p.w->inv_smooth + at, run, p.mode, p.codes + row * k + at);
    p.scales[(row * k + at) / run] = scale;
  }
}

// low_rank rows [row, row + Rows), ranks [r, r + 16).
template <DType X, DType L, int Rows>
void low_rank_tile(const QuantizeAct& p, int64_t row, int64_t r) {
  const int64_t rank = p.w->rank;
  const char* x = static_cast<const char*>(p.x) + row * p.x_stride * size_of(X);
  __m256 sum[Rows][2];
  NIBBLE_UNROLL
  for (int i = 0; i < Rows; ++i) sum[i][0] = sum[i][1] = _mm256_setzero_ps();
  for (int64_t k = 0; k < p.w->k; k += 2) {
    __m256 even[2], odd[2];
    NIBBLE_UNROLL
    for (int v = 0; v < 2; ++v) load_pairs(L, p.w->down + (k / 2 * rank + r + 8 * v) * 2, even + v, odd + v);
    NIBBLE_UNROLL
    for (int i = 0; i < Rows; ++i) {
      const __m256 x_even = broadcast8<X>(x, i * p.x_stride + k), x_odd = broadcast8<X>(x, i * p.x_stride + k + 1);
      NIBBLE_UNROLL
      for (int v = 0; v < 2; ++v) {
        sum[i][v] = _mm256_fmadd_ps(x_odd, odd[v], _mm256_fmadd_ps(x_even, even[v], sum[i][v]));
      }
    }
  }
  NIBBLE_UNROLL
  for (int i = 0; i < Rows; ++i) {
    NIBBLE_UNROLL
    for (int v = 0; v < 2; ++v) _mm256_storeu_ps(p.low_rank + (row + i) * rank + r + 8 * v, sum[i][v]);
  }
}

template <DType X, DType L>
void quantize_rows(const QuantizeAct& p, Range rows) {
  for (int64_t row = rows.begin; row < rows.end;) {
    const bool full = rows.end - row >= kRows;
    for (int64_t r = 0; r < p.w->rank; r += 16) {
      if (full) {
        low_rank_tile<X, L, kRows>(p, row, r);
      } else {
        low_rank_tile<X, L, 1>(p, row, r);
      }
    }
    for (int64_t end = row + (full ? kRows : 1); row < end; ++row) quantize_token<X>(p, row);
  }
}

}  // namespace

void quantize_act_avx2(const QuantizeAct& p, Range rows) {
  const bool bf16 = p.w->low_rank_dtype == DType::bf16;
  switch (p.x_dtype) {
    case DType::bf16:
      return bf16 ? quantize_rows<DType::bf16, DType::bf16>(p, rows) : quantize_rows<DType::bf16, DType::fp16>(p, rows);
    case DType::fp16:
      return bf16 ? quantize_rows<DType::fp16, DType::bf16>(p, rows) : quantize_rows<DType::fp16, DType::fp16>(p, rows);
    case DType::fp32:
      return bf16 ? quantize_rows<DType::fp32, DType::bf16>(p, rows) : quantize_rows<DType::fp32, DType::fp16>(p, rows);
  }
}

}  // namespace nibble
