// Activation quantization, AVX-512 with BF16: bf16 tokens meet bf16 factors in vdpbf16ps, two inputs a lane and step,
// without widening either. Other types take the file beside this one.
#include "kernels.h"
#include "quantize_act_avx512.h"

namespace nibble {
namespace {

constexpr int kRows = 8;  // 8 x 2 sums, 2 weight and 1 token registers of 32

// low_rank rows [row, row + Rows), ranks [r, r + 16 * Vectors).
template <int Rows, int Vectors>
inline void low_rank_pairs(const QuantizeAct& p, int64_t row, int64_t r) {
  const int64_t rank = p.w->rank;
  const uint16_t* x = static_cast<const uint16_t*>(p.x) + row * p.x_stride;
  __m512 sum[Rows][Vectors];
  NIBBLE_UNROLL
  for (int i = 0; i < Rows; ++i) {
    NIBBLE_UNROLL
    for (int v = 0; v < Vectors; ++v) sum[i][v] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < p.w->k; k += 2) {
    __m512bh pairs[Vectors];
    NIBBLE_UNROLL
    for (int v = 0; v < Vectors; ++v) {
      pairs[v] = (__m512bh)_mm512_loadu_si512(p.w->down + (k / 2 * rank + r + 16 * v) * 2);
    }
    NIBBLE_UNROLL
    for (int i = 0; i < Rows; ++i) {
      int both;
      memcpy(&both, x + i * p.x_stride + k, 4);
      const __m512bh x_pair = (__m512bh)_mm512_set1_epi32(both);
      NIBBLE_UNROLL
      for (int v = 0; v < Vectors; ++v) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], x_pair, pairs[v]);
    }
  }
  NIBBLE_UNROLL
  for (int i = 0; i < Rows; ++i) {
    NIBBLE_UNROLL
    for (int v = 0; v < Vectors; ++v) _mm512_storeu_ps(p.low_rank + (row + i) * rank + r + 16 * v, sum[i][v]);
  }
}

template <int Rows>
void low_rank_rows(const QuantizeAct& p, int64_t row) {
  int64_t r = 0;
  for (; r + 32 <= p.w->rank; r += 32) low_rank_pairs<Rows, 2>(p, row, r);
  for (; r < p.w->rank; r += 16) low_rank_pairs<Rows, 1>(p, row, r);
}

}  // namespace

void quantize_act_avx512bf16(const QuantizeAct& p, Range rows) {
  if (p.x_dtype != DType::bf16 || p.w->low_rank_dtype != DType::bf16) return quantize_act_avx512(p, rows);
  for (int64_t row = rows.begin; row < rows.end;) {
    const int64_t count = rows.end - row >= kRows ? kRows : 1;
    if (count == kRows) {
      low_rank_rows<kRows>(p, row);
    } else {
      low_rank_rows<1>(p, row);
    }
    for (int64_t end = row + count; row < end; ++row) quantize_token<DType::bf16>(p, row);
  }
}

}  // namespace nibble
