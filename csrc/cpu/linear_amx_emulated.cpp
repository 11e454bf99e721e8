// The AMX linear on emulated tiles: checks the indexing of linear_amx.h and linear_amx_folded.h on machines without
// AMX. Slow; chosen by tests only.
#include "linear_amx_folded.h"

namespace nibble {
namespace {

struct EmulatedTiles {
  int8_t tile[8][kTileBytes];

  template <int T>
  void zero() {
    memset(tile[T], 0, kTileBytes);
  }
  template <int T>
  void load(const void* from) {
    memcpy(tile[T], from, kTileBytes);
  }
  template <int T>
  void store(void* to) {
    memcpy(to, tile[T], kTileBytes);
  }
  template <int C, int A, int B>  // as the manual states TDPBSSD
  void multiply() {
    for (int m = 0; m < 16; ++m) {
      for (int n = 0; n < 16; ++n) {
        int32_t sum;
        memcpy(&sum, tile[C] + m * 64 + n * 4, 4);
        for (int k = 0; k < 16; ++k)
          for (int i = 0; i < 4; ++i) sum += tile[A][m * 64 + k * 4 + i] * tile[B][k * 64 + n * 4 + i];
        memcpy(tile[C] + m * 64 + n * 4, &sum, 4);
      }
    }
  }
};

}  // namespace

int64_t linear_scratch_amx_emulated(const Weight& w, int64_t m) {
  return max64(amx_scratch(w, m), folded_scratch(w, m));
}

void linear_amx_emulated(const Linear& p, Range rows, Range panels, uint8_t* scratch) {
  (folds(p) ? linear_folded<EmulatedTiles> : linear_tiles<EmulatedTiles>)(p, rows, panels, scratch);
}

}  // namespace nibble
