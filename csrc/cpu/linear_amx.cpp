// The 4-bit linear on the processor's AMX tiles. The algorithms are in linear_amx.h and linear_amx_folded.h.
#include "linear_amx_folded.h"

namespace nibble {
namespace {

// Eight tiles of 16 rows x 64 bytes, configured while this object lives. Written as assembly because the compilers'
// intrinsics take literal tile numbers only, not template arguments.
struct ProcessorTiles {
  ProcessorTiles() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    static_assert(sizeof(config) == 64, "the layout the processor reads");
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~ProcessorTiles() { asm volatile("tilerelease"); }
  ProcessorTiles(const ProcessorTiles&) = delete;
  ProcessorTiles& operator=(const ProcessorTiles&) = delete;

  template <int T>
  void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  template <int T>
  void load(const void* from) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(int64_t{64}), "i"(T) : "memory");
  }
  template <int T>
  void store(void* to) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(int64_t{64}), "i"(T) : "memory");
  }
  template <int C, int A, int B>  // C += A * B, signed bytes
  void multiply() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};

}  // namespace

int64_t linear_scratch_amx(const Weight& w, int64_t m) {
  return max64(amx_scratch(w, m), folded_scratch(w, m));
}

void linear_amx(const Linear& p, Range rows, Range panels, uint8_t* scratch) {
  (folds(p) ? linear_folded<ProcessorTiles> : linear_tiles<ProcessorTiles>)(p, rows, panels, scratch);
}

void linear_amx_grouped(const Linear& p, Range rows, Range panels, uint8_t* scratch) {
  linear_tiles<ProcessorTiles>(p, rows, panels, scratch);
}

}  // namespace nibble
