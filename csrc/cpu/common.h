// Helpers shared by the CPU kernels. Everything is `static inline`: each source file is built with its own instruction
// set, and the linker must never pick one file's copy for another (so no std:: templates here or in the kernels).
#pragma once
#include <cstring>

#include "../ops.h"

// Before a loop over an array of vectors: unrolled early, the array becomes registers. Left to itself GCC 12 unrolls
// too late for that and stores the sums to the stack in every round (the linear is then a tenth slower).
#define NIBBLE_UNROLL _Pragma("GCC unroll 16")

namespace nibble {

static inline int64_t min64(int64_t a, int64_t b) {
  return a < b ? a : b;
}
static inline int64_t max64(int64_t a, int64_t b) {
  return a > b ? a : b;
}
static inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
static inline int64_t size_of(DType t) {
  return t == DType::fp32 ? 4 : 2;
}
static inline float levels_of(ActMode mode) {
  return mode == ActMode::int8 ? 127.0f : mode == ActMode::int4 ? 7.0f : 15.0f;
}

static inline float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

static inline float bf16_to_float(uint16_t h) {
  return bits_to_float(static_cast<uint32_t>(h) << 16);
}

static inline uint16_t float_to_bf16(float f) {
  uint32_t u = float_to_bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;  // NaN stays NaN: rounding up could carry it to infinity
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

static inline float fp16_to_float(uint16_t h) {
  uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // Multiplying by 2^112 moves the exponent and makes subnormals normal, exactly.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

static inline uint16_t float_to_fp16(float f) {
  uint32_t u = float_to_bits(f), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // subnormal: let one fp32 addition do the rounding
    float shifted = bits_to_float(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (float_to_bits(shifted) - float_to_bits(0.5f)));
  }
  uint32_t odd = (magnitude >> 13) & 1u;
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}

static inline float half_to_float(uint16_t h, DType t) {
  return t == DType::bf16 ? bf16_to_float(h) : fp16_to_float(h);
}

static inline float load_float(const void* x, int64_t i, DType t) {
  if (t == DType::fp32) return static_cast<const float*>(x)[i];
  return half_to_float(static_cast<const uint16_t*>(x)[i], t);
}
static inline void store_float(void* y, int64_t i, DType t, float v) {
  if (t == DType::fp32) static_cast<float*>(y)[i] = v;
  if (t == DType::bf16) static_cast<uint16_t*>(y)[i] = float_to_bf16(v);
  if (t == DType::fp16) static_cast<uint16_t*>(y)[i] = float_to_fp16(v);
}

}  // namespace nibble
