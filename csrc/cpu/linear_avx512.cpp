// The 4-bit linear for AVX-512 with VNNI. The algorithm is in linear_avx512.h.
#include "linear_avx512.h"

namespace nibble {

int64_t linear_scratch_avx512(const Weight& w, int64_t m) {
  return vnni_scratch(w, m);
}

void linear_avx512(const Linear& p, Range rows, Range panels, uint8_t* scratch) {
  linear_vnni<false>(p, rows, panels, scratch);
}

}  // namespace nibble
