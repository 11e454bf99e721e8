// The linear of Ampere and later: exact integer dots of 64 inputs, then scales, low-rank branch, bias and what follows.
//
// W4A4 multiplies 4-bit tokens through INT4 units where there are any: twice the rate of INT8's by NVIDIA's figures.
// Elsewhere (on 9.0 and later ptxas spells such an instruction out) its tokens are widened to 8 bits in registers. Dots
// are exact both ways and what follows them is the same, so the bits are too. W4A8 has 8-bit integers also where there
// is e4m3 (8.9, 12.x): by NVIDIA's figures e4m3 with sums in fp32 runs at half the INT8 rate on GeForce cards, and
// INT8 tokens are nearer to the 16-bit ones.
//
// The panel16 layout needs no shuffling, since inputs and outputs may be dealt to the matrix units in any order that
// both operands keep to. Of 64 inputs lane q = l % 4 takes 16q..16q+15: 16 bytes of a token (8 in pairs), and two words
// of each output's weights, whose low nibbles are the first four inputs of eight and whose high ones the others. Of a
// panel's outputs lane l brings weights of 2r and 2r+1, r = l / 4, to two products, and gets sums of 4q..4q+3.
//
//   8 bits  a stored code (code + 8) in the upper half of a byte, its top bit turned over, is 16 times the code as a
//           signed byte; a token's nibble there is 16 times its code, signed or not
//   4 bits  words as they are; turning the top bit of each nibble makes code + 8 two's complement
//
// Turning a dot into fp32 is slow where conversions run at a quarter of the rate of sums. So dots start at the bits of
// 1.5 * 2^23, whose last bit counts ones: the sum's bits are that number plus the dot, and one subtraction is left.
//
// Norm and rotation of queries and keys are no epilogue here: a warp has half of a head's outputs, and the pass
// (rotate_heads.cu) costs little beside products of this speed.
#include "common.cuh"

namespace nibble {
namespace sm80 {
namespace {

constexpr int kThreads = 256, kTokens = 128, kOutputs = 128;
constexpr int kPanels = kOutputs / kPanel;
constexpr int kPanelBytes = kPanel * kGroup / 2;
constexpr int kZero = 0x4b400000;  // the bits of kZeroValue
constexpr float kZeroValue = 12582912.0f;

// How tokens come and are multiplied. Two blocks share a multiprocessor where their registers allow it without spills.
struct Product {
  bool group_scales;  // a scale a token and 64 inputs, not one a token
  bool pairs;         // two codes a byte
  bool without_sign;  // codes are 0..15
  bool four_bit;      // through INT4 units
  // Of a token in a stage, in bytes; of a dot.
  __host__ __device__ constexpr int pitch() const { return pairs ? 32 : 64; }
  __host__ __device__ constexpr float unit() const { return four_bit ? 1.0f : pairs ? 1.0f / 256 : 1.0f / 16; }
  __host__ __device__ constexpr int stages() const { return pairs ? 4 : 3; }
  __host__ __device__ constexpr int blocks() const { return four_bit ? 2 : 1; }
};

// A group of 64 inputs of the block's tokens and weights.
template <Product kIs>
struct Stage {
  uint8_t tokens[kTokens * kIs.pitch()];
  uint8_t codes[kPanels * kPanelBytes];
  uint16_t wscales[kPanels * kPanel];
  float scales[kIs.group_scales ? kTokens : 4];
};

// Where a block works: its first token and panel, and how many there are from there on.
struct Place {
  int64_t token;
  int panel, tokens, panels, groups;
};

// One group on its way into a stage. What lies past an edge is zero. Offsets are from the block's first token and
// panel: they fit 32 bits.
template <Product kIs>
__device__ inline void fetch(const Linear& p, const Weight& w, const Place& at, Stage<kIs>& stage, int group) {
  constexpr int kPieces = kIs.pitch() / 16;
  const int thread = static_cast<int>(threadIdx.x);
  const int8_t* tokens = p.codes + (at.token * at.groups + group) * kIs.pitch();
#pragma unroll
  for (int round = 0; round < kTokens * kPieces / kThreads; ++round) {
    const int i = round * kThreads + thread;
    const bool real = i / kPieces < at.tokens;
    const int row = real ? i / kPieces : 0;
    copy_16(&stage.tokens[i * 16], tokens + row * at.groups * kIs.pitch() + i % kPieces * 16, real);
  }
  // Eight pieces of 16 bytes are a lane's two words for 16 outputs: the four lanes find theirs in different banks.
  const int piece = thread % 32, turned = piece ^ piece / 8 * 2;
  const bool real = thread / 32 < at.panels;
  const uint8_t* codes = w.codes + (int64_t{at.panel} * at.groups + group) * kPanelBytes;
  copy_16(&stage.codes[thread / 32 * kPanelBytes + turned * 16],
          codes + (real ? thread / 32 : 0) * at.groups * kPanelBytes + piece * 16, real);
  if (kIs.group_scales && thread < kTokens) {
    const bool there = thread < at.tokens;
    copy_4(&stage.scales[thread], p.scales + at.token * at.groups + group + (there ? thread : 0) * at.groups, there);
  }
  if (thread >= kTokens && thread < kTokens + kPanels * 2) {
    const int part = thread - kTokens;
    const bool there = part / 2 < at.panels;
    const uint16_t* wscales = w.scales + (int64_t{at.panel} * at.groups + group) * kPanel;
    copy_16(&stage.wscales[part * 8],
            wscales + (there ? part / 2 : 0) * at.groups * static_cast<int>(kPanel) + part % 2 * 8, there);
  }
}

// What a warp holds: 32 tokens (two tiles of 16) by 64 outputs (four panels).
struct Warp {
  int row, q, token, panel;  // row and q as the matrix units number a lane; token, panel: within the block
  __device__ Warp()
      : row(static_cast<int>(threadIdx.x) % 32 / 4),
        q(static_cast<int>(threadIdx.x) % 4),
        token(static_cast<int>(threadIdx.x) / 32 % 4 * 32),
        panel(static_cast<int>(threadIdx.x) / 128 * 4) {}
};

// [tile of tokens][panel][which of two products][as the matrix units give them]: output 4q + i % 2 * 2 + product of
// token row + i / 2 * 8.
using Sums = float[2][4][2][4];

constexpr uint32_t kUpper = 0xf0f0f0f0u, kTop = 0x80808080u, kTops = 0x88888888u;

// The operand a of a tile of 16 tokens for the two halves of a group; in 4 bits it is the first alone.
template <Product kIs>
__device__ inline void load_tokens(const uint8_t* from, uint32_t (&a)[2][4]) {
  if constexpr (kIs.pairs) {
    const uint2 upper = *reinterpret_cast<const uint2*>(from);
    const uint2 lower = *reinterpret_cast<const uint2*>(from + 8 * kIs.pitch());
    if constexpr (kIs.four_bit) {
      a[0][0] = upper.x, a[0][1] = lower.x, a[0][2] = upper.y, a[0][3] = lower.y;
    } else {
      a[0][0] = upper.x << 4 & kUpper, a[0][1] = lower.x << 4 & kUpper, a[0][2] = upper.x & kUpper;
      a[1][0] = upper.y << 4 & kUpper, a[1][1] = lower.y << 4 & kUpper, a[1][2] = upper.y & kUpper;
      a[0][3] = lower.x & kUpper, a[1][3] = lower.y & kUpper;
    }
  } else {
    const uint4 upper = *reinterpret_cast<const uint4*>(from);
    const uint4 lower = *reinterpret_cast<const uint4*>(from + 8 * kIs.pitch());
    a[0][0] = upper.x, a[0][1] = lower.x, a[0][2] = upper.y, a[0][3] = lower.y;
    a[1][0] = upper.z, a[1][1] = lower.z, a[1][2] = upper.w, a[1][3] = lower.w;
  }
}

// Dots of 16 tokens and 8 outputs, as the bits of kZeroValue + dot; b: a lane's two words of weights.
template <Product kIs>
__device__ inline void multiply_64(int (&dot)[4], const uint32_t (&a)[2][4], const uint32_t (&b)[2]) {
  const int zero[4] = {kZero, kZero, kZero, kZero};
  if constexpr (kIs.four_bit) {
    multiply_4bit<kIs.without_sign>(dot, a[0], b[0] ^ kTops, b[1] ^ kTops, zero);
  } else {
    constexpr bool kUnsigned = kIs.without_sign && kIs.pairs;  // bytes of 0..15 are signed bytes too
    int half[4];
    multiply_8bit<kUnsigned>(half, a[0], (b[0] << 4 & kUpper) ^ kTop, (b[0] & kUpper) ^ kTop, zero);
    multiply_8bit<kUnsigned>(dot, a[1], (b[1] << 4 & kUpper) ^ kTop, (b[1] & kUpper) ^ kTop, half);
  }
}

template <Product kIs>
__device__ inline void multiply(const Stage<kIs>& stage, DType scale_dtype, const Warp& warp, Sums& sum) {
  uint32_t a[2][2][4];
  float scale[2][2];
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const int token = warp.token + t * 16 + warp.row;
    load_tokens<kIs>(&stage.tokens[token * kIs.pitch() + warp.q * (kIs.pitch() / 4)], a[t]);
    if constexpr (kIs.group_scales) scale[t][0] = stage.scales[token], scale[t][1] = stage.scales[token + 8];
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    uint32_t b[2][2];  // of two products, a lane's two words
#pragma unroll
    for (int word = 0; word < 2; ++word) {
      const int piece = (warp.q * 8 + word * 4 + warp.row / 2) ^ warp.q * 2;
      const uint2 both =
          *reinterpret_cast<const uint2*>(&stage.codes[(warp.panel + j) * kPanelBytes + piece * 16 + warp.row % 2 * 8]);
      b[0][word] = both.x, b[1][word] = both.y;
    }
    const uint2 words = *reinterpret_cast<const uint2*>(&stage.wscales[((warp.panel + j) * kPanel + warp.q * 4)]);
    const float2 low = widen_two(words.x, scale_dtype), high = widen_two(words.y, scale_dtype);
    const float of[2][2] = {{low.x * kIs.unit(), high.x * kIs.unit()}, {low.y * kIs.unit(), high.y * kIs.unit()}};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        int dot[4];
        multiply_64<kIs>(dot, a[t], b[h]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float part = __int_as_float(dot[i]) - kZeroValue;
          if constexpr (kIs.group_scales) part *= scale[t][i / 2];
          sum[t][j][h][i] = fmaf(part, of[h][i % 2], sum[t][j][h][i]);
        }
      }
    }
  }
}

// sum += low_rank x up in bfloat16, the projection rounded to it as published kernels do.
__device__ inline void add_low_rank_bf16(const Linear& p, const Weight& w, const Place& at, const Warp& warp,
                                         Sums& sum) {
#pragma unroll 1
  for (int r = 0; r < static_cast<int>(w.rank); r += 16) {
    uint32_t a[2][4];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int64_t m = at.token + min(warp.token + i / 4 * 16 + i % 2 * 8 + warp.row, at.tokens - 1);
      const float* from = p.low_rank + m * w.rank + r + i % 4 / 2 * 8 + warp.q * 2;
      a[i / 4][i % 4] = round_two_bf16(*reinterpret_cast<const float2*>(from));
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int panel = at.panel + min(warp.panel + j, at.panels - 1);
      const auto* pairs = reinterpret_cast<const uint32_t*>(w.up) + int64_t{panel} * (w.rank / 2) * kPanel;
      const auto both = [&](int pair) {
        return *reinterpret_cast<const uint2*>(pairs + (r / 2 + pair + warp.q) * static_cast<int>(kPanel) +
                                               warp.row * 2);
      };
      const uint2 first = both(0), second = both(4);
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        multiply_16<__nv_bfloat16>(sum[t][j][0], a[t], first.x, second.x);
        multiply_16<__nv_bfloat16>(sum[t][j][1], a[t], first.y, second.y);
      }
    }
  }
}

// The same in fp32 for the other types, whose results would show that rounding.
__device__ inline void add_low_rank(const Linear& p, const Weight& w, const Place& at, const Warp& warp, Sums& sum) {
#pragma unroll 1
  for (int r = 0; r < static_cast<int>(w.rank); r += 2) {
    float2 tokens[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t m = at.token + min(warp.token + i * 8 + warp.row, at.tokens - 1);
      tokens[i / 2][i % 2] = *reinterpret_cast<const float2*>(p.low_rank + m * w.rank + r);
    }
#pragma unroll
    for (int tile = 0; tile < 8; ++tile) {  // outputs 2 tile % 4 and the next of a panel's four
      const int panel = at.panel + min(warp.panel + tile / 2, at.panels - 1);
      const int64_t pair = (int64_t{panel} * (w.rank / 2) + r / 2) * kPanel + warp.q * 4 + tile % 2 * 2;
      const uint2 words = *reinterpret_cast<const uint2*>(w.up + pair * 2);
      const float2 up[2] = {widen_two(words.x, w.low_rank_dtype), widen_two(words.y, w.low_rank_dtype)};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float2 token = tokens[i / 4][i / 2 % 2];
        float& s = sum[i / 4][tile / 2][i % 2][i / 2 % 2 * 2 + tile % 2];
        s = fmaf(token.y, up[i % 2].y, fmaf(token.x, up[i % 2].x, s));
      }
    }
  }
}

// sum *= the scales of whole tokens.
__device__ inline void scale_tokens(const Linear& p, const Place& at, const Warp& warp, Sums& sum) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float scale = p.scales[at.token + min(warp.token + i * 8 + warp.row, at.tokens - 1)];
#pragma unroll
    for (int tile = 0; tile < 8; ++tile) {
      sum[i / 2][tile / 2][tile % 2][i % 2 * 2] *= scale;
      sum[i / 2][tile / 2][tile % 2][i % 2 * 2 + 1] *= scale;
    }
  }
}

// Four outputs of a token, from n of `width` on, on their way to y[at]; gates: the token's; whole: all four exist, at a
// border of their size.
__device__ inline void finish(const LinearSm80& p, const uint16_t* gates, int64_t at, int n, int width, bool whole,
                              float (&v)[4]) {
  const Linear& of = p.of;
  if (p.gelu || p.gate) round_four(of.y_dtype, v);
  if (p.gelu) {
#pragma unroll
    for (float& value : v) value = gelu(value);
  }
  if (p.gate) {
    const auto* y = static_cast<const uint16_t*>(of.y) + at;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (whole || n + e < width) v[e] = fmaf(widen(gates[n + e], DType::bf16), v[e], widen(y[e], DType::bf16));
    }
  }
  if (whole) {
    store_four(of.y, of.y_dtype, at, v);
    return;
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if (n + e < width) store(of.y, of.y_dtype, at + e, v[e]);
  }
}

__device__ inline void write(const LinearSm80& p, const Weight& w, const Place& at, const Warp& warp, const Sums& sum) {
  const int width = static_cast<int>(w.n);
  const bool whole = width % 4 == 0 && reinterpret_cast<uintptr_t>(p.of.y) % 16 == 0;
  const int first = (at.panel + warp.panel) * static_cast<int>(kPanel) + warp.q * 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int token = warp.token + i * 8 + warp.row;
    if (token >= at.tokens) break;
    const int64_t m = at.token + token;
    const auto sample = static_cast<uint32_t>(m) / static_cast<uint32_t>(p.tokens_per_sample);
    const uint16_t* gates = p.gate + sample * p.gate_stride;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int n = first + j * static_cast<int>(kPanel);
      if (n >= width) break;
      const float4 bias = *reinterpret_cast<const float4*>(w.bias + n);
      const auto& [even, odd] = sum[i / 2][j];
      const int low = i % 2 * 2;
      float v[4] = {even[low] + bias.x, odd[low] + bias.y, even[low + 1] + bias.z, odd[low + 1] + bias.w};
      finish(p, gates, m * width + n, n, width, whole, v);
    }
  }
}

template <Product kIs>
__global__ void __launch_bounds__(kThreads, kIs.blocks()) linear_kernel(const LinearSm80 p, const Weight w) {
  constexpr int kStages = kIs.stages();
  __shared__ __align__(16) Stage<kIs> stages[kStages];
  const int64_t token = int64_t{blockIdx.y} * kTokens;
  const int panel = static_cast<int>(blockIdx.x) * kPanels, panels = static_cast<int>((w.n + kPanel - 1) / kPanel);
  const Place at{token, panel, static_cast<int>(min(p.of.m - token, int64_t{kTokens})), panels - panel,
                 static_cast<int>(w.k / kGroup)};
  const Warp warp;
  Sums sum = {};
  for (int group = 0; group < kStages - 1; ++group) {
    if (group < at.groups) fetch<kIs>(p.of, w, at, stages[group], group);
    close_copies();
  }
  for (int group = 0; group < at.groups; ++group) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // this group is here for all, and all are done with the stage that is filled next
    const int next = group + kStages - 1;
    if (next < at.groups) fetch<kIs>(p.of, w, at, stages[next % kStages], next);
    close_copies();
    multiply<kIs>(stages[group % kStages], w.scale_dtype, warp, sum);
  }
  if constexpr (!kIs.group_scales) scale_tokens(p.of, at, warp, sum);
  if (p.of.y_dtype == DType::bf16 && w.low_rank_dtype == DType::bf16) {
    add_low_rank_bf16(p.of, w, at, warp, sum);
  } else {
    add_low_rank(p.of, w, at, warp, sum);
  }
  write(p, w, at, warp, sum);
}

using Kernel = void (*)(LinearSm80, Weight);

Kernel kernel_of(const LinearSm80& p, bool four_bit) {
  const bool without_sign = p.of.mode == ActMode::uint4;
  if (p.of.mode == ActMode::int8) return linear_kernel<Product{false, false, false, false}>;
  if (!p.pairs) return linear_kernel<Product{true, false, false, false}>;
  if (four_bit) {
    return without_sign ? linear_kernel<Product{true, true, true, true}>
                        : linear_kernel<Product{true, true, false, true}>;
  }
  return without_sign ? linear_kernel<Product{true, true, true, false}>
                      : linear_kernel<Product{true, true, false, false}>;
}

// Whether the current device has INT4 units: those of compute capability 8 have.
bool has_four_bit_units() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 8;
}

}  // namespace
}  // namespace sm80

Status linear_sm80(const LinearSm80& p, void* stream) {
  if (!p.of.m) return nullptr;
  const Weight& w = *p.of.w;
  const dim3 grid(static_cast<unsigned>((w.n + sm80::kOutputs - 1) / sm80::kOutputs),
                  static_cast<unsigned>((p.of.m + sm80::kTokens - 1) / sm80::kTokens));
  if (grid.y > 65535) return "more than 8 million tokens in one call";
  const bool four_bit = p.form == kChosenProduct ? sm80::has_four_bit_units() : p.form == kFourBitProduct;
  sm80::kernel_of(p, four_bit)<<<grid, sm80::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, w);
  return sm80::launched();
}

}  // namespace nibble
