// The native boundary: plain parameter structs of pointers and sizes. No framework, no allocation, no state.
//
// Letters: M tokens, N outputs, K inputs, R low-rank size, G = K / 64 groups. Every function returns nullptr when it
// worked, or a sentence for a person. Callers check shapes; kernels trust them.
#pragma once
#include <cstdint>

namespace nibble {

using Status = const char*;  // nullptr: worked

enum class DType : int { bf16 = 0, fp16 = 1, fp32 = 2 };

// How activations are quantized. int8: one scale a token. int4, uint4: one scale a token and 64 inputs.
enum class ActMode : int { int8 = 0, int4 = 1, uint4 = 2 };

constexpr int64_t kGroup = 64;                   // inputs that share a weight scale
constexpr int64_t kPanel = 16;                   // outputs that lie side by side in the packed layout
constexpr float kUnsignedShift = 11.0f / 64.0f;  // lifts GELU's minimum above zero; exact in every type
constexpr float kTinyMax = 0x1p-120f;            // a token or group whose largest value is below this counts as zero

// One packed linear ("panel16"). Panel p holds outputs 16p..16p+15; the last panel is padded with zero weights.
//   codes  [panels][K/8][16][4]  byte j of block b: low nibble input 8b+j, high nibble input 8b+4+j; stored code + 8
//   scales [panels][K/64][16]    16-bit
//   up     [panels][R/2][16][2]  16-bit; pairs of ranks side by side
//   down   [K/2][R][2]           16-bit; pairs of inputs side by side
//   inv_smooth [K], bias [panels*16]: fp32
struct Weight {
  const uint8_t* codes;
  const uint16_t* scales;
  const uint16_t* up;
  const uint16_t* down;
  const float* inv_smooth;
  const float* bias;
  int64_t n, k, rank;
  DType scale_dtype, low_rank_dtype;
};

// codes (M,K) int8, scales (M) or (M,G) fp32, low_rank (M,R) fp32 <- x (M,K), rows x_stride elements apart.
//   t = (x [+ shift]) * inv_smooth;  int8: scale = max|t| * (1/127) over K;  int4: * (1/7), uint4: * (1/15) over 64
//   codes = round_half_even(t * (127 | 7 | 15) / max|t|);  low_rank = x @ down^T. All in fp32.
struct QuantizeAct {
  const Weight* w;
  const void* x;
  int64_t m, x_stride;
  DType x_dtype;
  ActMode mode;
  int8_t* codes;
  float* scales;
  float* low_rank;
};

// y (M,N) = scale_act * sum_g scale_w[g] * dot_g(codes, act codes) + low_rank @ up^T + bias, fp32 inside.
struct Linear {
  const Weight* w;
  const int8_t* codes;
  const float* scales;
  const float* low_rank;
  int64_t m;
  ActMode mode;
  void* y;
  DType y_dtype;
};

// A weight-only linear (W4A16): W = code * scale + zero, codes 0..15, group 64.
//   codes as in Weight, but stored as they are; scales, zeros [panels][K/64][16] 16-bit; bias [panels*16] fp32
struct AwqLinear {
  const uint8_t* codes;
  const uint16_t* scales;
  const uint16_t* zeros;
  const float* bias;
  int64_t n, k;
  DType scale_dtype;
  const float* x;  // (M,K), rows x_stride elements apart
  int64_t m, x_stride;
  void* y;
  DType y_dtype;
};

struct Range {
  int64_t begin, end;
};

// What one instruction set offers. Each function computes a part of the result: rows (tokens) or panels it is given,
// so that who computes an element never changes its bits. `scratch` has scratch_bytes(w, m) bytes for one thread.
struct Kernels {
  const char* name;
  void (*quantize_act)(const QuantizeAct&, Range rows);
  void (*linear)(const Linear&, Range rows, Range panels, uint8_t* scratch);
  void (*awq_linear)(const AwqLinear&, Range panels);
  int64_t (*scratch_bytes)(const Weight&, int64_t m);
  int64_t row_tile;    // tokens an inner tile takes: fewer are not worth a thread of their own
  int64_t panel_cost;  // what preparing a panel of weights costs, in tokens multiplied with it
};

}  // namespace nibble
