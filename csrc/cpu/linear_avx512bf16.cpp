// The 4-bit linear for AVX-512 with VNNI and BF16, which halves the low-rank branch. The algorithm is in
// linear_avx512.h.
#include "linear_avx512.h"

namespace nibble {

int64_t linear_scratch_avx512bf16(const Weight& w, int64_t m) {
  return vnni_scratch(w, m);
}

void linear_avx512bf16(const Linear& p, Range rows, Range panels, uint8_t* scratch) {
  linear_vnni<true>(p, rows, panels, scratch);
}

}  // namespace nibble
