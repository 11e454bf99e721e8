// One name a CUDA kernel and architecture. `stream` is a cudaStream_t; a launch that fails comes back as a sentence.
#pragma once
#include "../ops.h"

namespace nibble {

// out (N,K) bf16 or fp16 <- codes (N,K/2) int4 in canonical order, scales (N,K/64) of the same 16-bit type.
struct DequantizeInt4 {
  const uint8_t* codes;
  const uint16_t* scales;
  uint16_t* out;
  int64_t n, k;
  DType dtype;
};

Status dequantize_int4_sm80(const DequantizeInt4&, void* stream);
Status dequantize_int4_sm90a(const DequantizeInt4&, void* stream);
Status dequantize_int4_sm120a(const DequantizeInt4&, void* stream);

}  // namespace nibble
