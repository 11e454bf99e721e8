// What this processor and this system can run. Built without special flags; nothing here needs more than SSE2.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "kernels.h"

namespace nibble {
namespace {

struct Features {
  bool avx2 = false, avx512 = false, avx512bf16 = false, amx = false;
  const char *why_avx2 = "", *why_avx512 = "", *why_amx = "";
};

uint64_t enabled_state() {  // XCR0: register files that the system saves
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

// Linux hands out the 8 KiB of tile state on request only, once for the whole process.
bool request_tile_state() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

Features detect() {
  Features f;
  unsigned a, b, c, d, a1, b1, c1, d1;
  if (!__get_cpuid(1, &a1, &b1, &c1, &d1) || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    f.why_avx2 = f.why_avx512 = f.why_amx = "the processor does not list its features";
    return f;
  }
  const uint64_t state = c1 & bit_OSXSAVE ? enabled_state() : 0;
  const bool has_avx2 = (b & bit_AVX2) && (c1 & bit_FMA) && (c1 & bit_F16C);
  const unsigned wanted = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
  const bool has_avx512 = (b & wanted) == wanted && (c & bit_AVX512VNNI);
  constexpr unsigned kAmxTileInt8 = 1u << 24 | 1u << 25;
  f.avx2 = has_avx2 && (state & 0x6) == 0x6;
  f.avx512 = f.avx2 && has_avx512 && (state & 0xe6) == 0xe6;
  f.why_avx2 = f.avx2     ? ""
               : has_avx2 ? "the system does not save AVX registers"
                          : "the processor lacks AVX2, FMA or F16C";
  f.why_avx512 = f.avx512     ? ""
                 : has_avx512 ? "the system does not save AVX-512 registers"
                              : "the processor lacks AVX-512 (F, BW, DQ, VL) or VNNI";
  unsigned a7, b7, c7, d7;
  f.avx512bf16 = f.avx512 && a >= 1 && __get_cpuid_count(7, 1, &a7, &b7, &c7, &d7) && (a7 & 1u << 5);
  if (!f.avx512) {
    f.why_amx = f.why_avx512;
  } else if ((d & kAmxTileInt8) != kAmxTileInt8 || !f.avx512bf16) {
    f.why_amx = "the processor lacks AMX-INT8";
  } else if ((state & 0x60000) != 0x60000 || !request_tile_state()) {
    f.why_amx = "the system does not grant AMX tile state";
  } else {
    f.amx = true;
  }
  return f;
}

}  // namespace

const Isa* isa_table() {
  static const Features f = detect();
  static const auto quantize_512 = f.avx512bf16 ? quantize_act_avx512bf16 : quantize_act_avx512;
  static const auto linear_512 = f.avx512bf16 ? linear_avx512bf16 : linear_avx512;
  static const Isa table[kIsaCount] = {
      {{"amx", quantize_512, linear_amx, awq_linear_avx512, linear_scratch_amx, 32, 96}, f.amx, f.why_amx},
      {{"avx512", quantize_512, linear_512, awq_linear_avx512, linear_scratch_avx512, 14, 2}, f.avx512, f.why_avx512},
      {{"avx2", quantize_act_avx2, linear_avx2, awq_linear_avx2, linear_scratch_avx2, 4, 0}, f.avx2, f.why_avx2},
      {{"scalar", quantize_act_scalar, linear_scalar, awq_linear_scalar, linear_scratch_scalar, 1, 0}, true, ""},
      // For tests and fair comparisons only: older code on a newer processor, AMX that keeps group scales for any
      // number of tokens, and AMX where there is none.
      {{"avx512_without_bf16", quantize_act_avx512, linear_avx512, awq_linear_avx512, linear_scratch_avx512, 14, 2},
       f.avx512,
       f.why_avx512},
      {{"amx_grouped", quantize_512, linear_amx_grouped, awq_linear_avx512, linear_scratch_amx, 32, 20},
       f.amx,
       f.why_amx},
      {{"amx_emulated", quantize_512, linear_amx_emulated, awq_linear_avx512, linear_scratch_amx_emulated, 32, 96},
       f.avx512bf16,
       f.avx512bf16 ? "" : "the processor lacks AVX-512 BF16, which every processor with AMX has"},
  };
  return table;
}

}  // namespace nibble
