// One name a kernel and instruction set; isa.cpp says which of them this machine can run.
#pragma once
#include "../ops.h"

namespace nibble {

#define NIBBLE_QUANTIZE(isa) void quantize_act_##isa(const QuantizeAct&, Range rows)
#define NIBBLE_LINEAR(isa)                                                      \
  void linear_##isa(const Linear&, Range rows, Range panels, uint8_t* scratch); \
  int64_t linear_scratch_##isa(const Weight&, int64_t m)
#define NIBBLE_AWQ(isa) void awq_linear_##isa(const AwqLinear&, Range panels)

NIBBLE_QUANTIZE(scalar);
NIBBLE_QUANTIZE(avx2);
NIBBLE_QUANTIZE(avx512);
NIBBLE_QUANTIZE(avx512bf16);
NIBBLE_LINEAR(scalar);
NIBBLE_LINEAR(avx2);
NIBBLE_LINEAR(avx512);
NIBBLE_LINEAR(avx512bf16);
NIBBLE_LINEAR(amx);
NIBBLE_LINEAR(amx_emulated);
void linear_amx_grouped(const Linear&, Range rows, Range panels, uint8_t* scratch);
NIBBLE_AWQ(scalar);
NIBBLE_AWQ(avx2);
NIBBLE_AWQ(avx512);

#undef NIBBLE_QUANTIZE
#undef NIBBLE_LINEAR
#undef NIBBLE_AWQ

// The instruction sets this build knows, best first; `why` is filled where one cannot run here.
struct Isa {
  Kernels kernels;
  bool runs;
  const char* why;
};
constexpr int kIsaCount = 7;
const Isa* isa_table();  // [kIsaCount]; asks the processor and the system once

// Runs fn(context, i) for i in [0, chunks) on at most `threads` threads, on the OpenMP pool the process already has.
void parallel_for(int threads, int64_t chunks, void (*fn)(void* context, int64_t chunk), void* context);

Status run_quantize_act(const Isa&, const QuantizeAct&, int threads);
Status run_linear(const Isa&, const Linear&, int threads, uint8_t* scratch, int64_t scratch_bytes);
Status run_svdq_linear(const Isa&, const QuantizeAct& tokens, const Linear&, int threads, uint8_t* scratch,
                       int64_t scratch_bytes);  // the two above, where `tokens` writes what the linear reads
Status run_awq_linear(const Isa&, const AwqLinear&, int threads);

}  // namespace nibble
