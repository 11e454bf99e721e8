// Activation quantization, AVX-512 (F, BW, DQ, VL): the low-rank product in fp32 multiply-adds.
#include "quantize_act_avx512.h"

#include "kernels.h"

namespace nibble {
namespace {

constexpr int kRows = 6;  // 6 x 2 sums, 4 weight and 2 token registers of 32

template <DType X, DType L, int Rows>
void low_rank_rows(const QuantizeAct& p, int64_t row) {
  int64_t r = 0;
  for (; r + 32 <= p.w->rank; r += 32) low_rank_tile<X, L, Rows, 2>(p, row, r);
  for (; r < p.w->rank; r += 16) low_rank_tile<X, L, Rows, 1>(p, row, r);
}

template <DType X, DType L>
void quantize_rows(const QuantizeAct& p, Range rows) {
  for (int64_t row = rows.begin; row < rows.end;) {
    const int64_t count = rows.end - row >= kRows ? kRows : 1;
    if (count == kRows) {
      low_rank_rows<X, L, kRows>(p, row);
    } else {
      low_rank_rows<X, L, 1>(p, row);
    }
    for (int64_t end = row + count; row < end; ++row) quantize_token<X>(p, row);
  }
}

}  // namespace

void quantize_act_avx512(const QuantizeAct& p, Range rows) {
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
