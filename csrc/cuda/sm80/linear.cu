// The linear of Ampere and later: exact integer dots of 64 inputs, W4A4 and W4A8 alike, through 8-bit mma.
//
// 4-bit token codes travel as bytes, so one kernel serves int8, int4 and uint4 tokens, and its dots are exact in all
// three. The panel16 layout needs no shuffling: inputs may be dealt to the matrix units in any order that both operands
// keep to. Lane q = l % 4 takes inputs 8q..8q+7 of each 32: its 8 bytes of a token, and one word of weights, whose low
// nibbles are inputs 8q..8q+3 and whose high nibbles are 8q+4..8q+7. A stored code (code + 8) in the upper half of a
// byte, its top bit turned over, is 16 times the code as a signed byte: one instruction.
#include "common.cuh"

namespace nibble {
namespace sm80 {
namespace {

constexpr int kThreads = 256, kTokens = 128, kOutputs = 128, kStages = 3;
constexpr int kPitch = 96;  // bytes from token to token: 64 and a gap that keeps lanes off each other's banks
constexpr int kPanels = kOutputs / kPanel;
constexpr int kPanelBytes = kPanel * kGroup / 2;
constexpr float kCodeUnit = 1.0f / 16;

struct Shared {
  uint8_t tokens[kStages][kTokens * kPitch];
  uint8_t codes[kStages][kPanels * kPanelBytes];
};

__device__ inline void copy_16(void* to, const void* from, bool real) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(real ? 16 : 0) : "memory");
}

// Where a block works: its first token and panel.
struct Place {
  int64_t token;
  int panel, panels, groups;
};

// One group of 64 inputs of the block's tokens and weights on its way into a stage. What lies past an edge is zero.
__device__ inline void fetch(const Linear& p, const Weight& w, const Place& at, Shared& shared, int group) {
  const int stage = group % kStages;
#pragma unroll
  for (int i = threadIdx.x; i < kTokens * 4; i += kThreads) {
    const int64_t row = at.token + i / 4;
    const bool real = row < p.m;
    copy_16(&shared.tokens[stage][i / 4 * kPitch + i % 4 * 16],
            p.codes + (real ? row : 0) * w.k + group * kGroup + i % 4 * 16, real);
  }
  const int panel = at.panel + static_cast<int>(threadIdx.x) / 32, piece = threadIdx.x % 32 * 16;
  const bool real = panel < at.panels;
  copy_16(&shared.codes[stage][threadIdx.x / 32 * kPanelBytes + piece],
          w.codes + (int64_t{real ? panel : 0} * at.groups + group) * kPanelBytes + piece, real);
}

// What a warp holds: 32 tokens (two tiles of 16) by 64 outputs (four panels, eight tiles of 8).
struct Warp {
  int lane, row, q, token, panel;  // row and q as the matrix units number a lane; token, panel: within the block
  __device__ Warp()
      : lane(threadIdx.x % 32),
        row(lane / 4),
        q(lane % 4),
        token(threadIdx.x / 32 % 4 * 32),
        panel(threadIdx.x / 128 * 4) {}
};

using Sums = float[2][8][4];

template <bool kGroupScales>
__device__ inline void multiply(const Linear& p, const Weight& w, const Place& at, const Shared& shared, int group,
                                const Warp& warp, Sums& sum) {
  const int stage = group % kStages;
  uint32_t a[2][2][4];
  float scale[2][2];
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const uint8_t* from = &shared.tokens[stage][(warp.token + t * 16 + warp.row) * kPitch + warp.q * 8];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint2 upper = *reinterpret_cast<const uint2*>(from + half * 32);
      const uint2 lower = *reinterpret_cast<const uint2*>(from + 8 * kPitch + half * 32);
      a[t][half][0] = upper.x, a[t][half][1] = lower.x, a[t][half][2] = upper.y, a[t][half][3] = lower.y;
      if constexpr (kGroupScales) {
        const int64_t m = min(at.token + warp.token + t * 16 + half * 8 + warp.row, p.m - 1);
        scale[t][half] = p.scales[m * at.groups + group];
      }
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int panel = min(at.panel + warp.panel + j, at.panels - 1);
    const auto* words = reinterpret_cast<const uint32_t*>(&shared.codes[stage][(warp.panel + j) * kPanelBytes]);
    uint32_t codes[2][2];  // of the panel's outputs 0..7 and 8..15, for the two runs of 32 inputs
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Two lanes in four read the later outputs first: otherwise they would meet in the same banks.
      const uint32_t* block = words + (half * 4 + warp.q) * kPanel + warp.row;
      const bool late = warp.q >= 2;
      const uint32_t first = block[late ? 8 : 0], second = block[late ? 0 : 8];
      codes[0][half] = late ? second : first;
      codes[1][half] = late ? first : second;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const auto* scales = w.scales + (panel * at.groups + group) * static_cast<int>(kPanel) + h * 8 + warp.q * 2;
      float2 of = widen_two(*reinterpret_cast<const uint32_t*>(scales), w.scale_dtype);
      of.x *= kCodeUnit, of.y *= kCodeUnit;
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        int dot[4] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          multiply_s8(dot, a[t][half], (codes[h][half] << 4 & 0xf0f0f0f0u) ^ 0x80808080u,
                      (codes[h][half] & 0xf0f0f0f0u) ^ 0x80808080u);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float part = static_cast<float>(dot[i]);
          if constexpr (kGroupScales) part *= scale[t][i / 2];
          sum[t][j * 2 + h][i] = fmaf(part, i % 2 ? of.y : of.x, sum[t][j * 2 + h][i]);
        }
      }
    }
  }
}

// sum += low_rank x up, in fp32: R products an element beside the K of the integers.
__device__ inline void add_low_rank(const Linear& p, const Weight& w, const Place& at, const Warp& warp, Sums& sum) {
#pragma unroll 1
  for (int r = 0; r < static_cast<int>(w.rank); r += 2) {
    float2 tokens[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t m = min(at.token + warp.token + i * 8 + warp.row, p.m - 1);
      tokens[i / 2][i % 2] = *reinterpret_cast<const float2*>(p.low_rank + m * w.rank + r);
    }
#pragma unroll
    for (int tile = 0; tile < 8; ++tile) {
      const int panel = min(at.panel + warp.panel + tile / 2, at.panels - 1);
      const int64_t pair = (int64_t{panel} * (w.rank / 2) + r / 2) * kPanel + tile % 2 * 8 + warp.q * 2;
      const uint2 words = *reinterpret_cast<const uint2*>(w.up + pair * 2);
      const float2 even = widen_two(words.x, w.low_rank_dtype), odd = widen_two(words.y, w.low_rank_dtype);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float2 up = i % 2 ? odd : even, token = tokens[i / 4][i / 2 % 2];
        float& s = sum[i / 4][tile][i % 4];
        s = fmaf(token.y, up.y, fmaf(token.x, up.x, s));
      }
    }
  }
}

template <bool kGroupScales>
__global__ void __launch_bounds__(kThreads) linear_s8_kernel(const Linear p, const Weight w) {
  __shared__ __align__(16) Shared shared;
  const Place at{int64_t{blockIdx.y} * kTokens, static_cast<int>(blockIdx.x) * kPanels,
                 static_cast<int>((w.n + kPanel - 1) / kPanel), static_cast<int>(w.k / kGroup)};
  const Warp warp;
  Sums sum = {};
  for (int group = 0; group < kStages - 1; ++group) {
    if (group < at.groups) fetch(p, w, at, shared, group);
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  for (int group = 0; group < at.groups; ++group) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
    __syncthreads();  // this group is here for all, and all are done with the stage that is filled next
    if (group + kStages - 1 < at.groups) fetch(p, w, at, shared, group + kStages - 1);
    asm volatile("cp.async.commit_group;" ::: "memory");
    multiply<kGroupScales>(p, w, at, shared, group, warp, sum);
  }
  if constexpr (!kGroupScales) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float scale = p.scales[min(at.token + warp.token + i * 8 + warp.row, p.m - 1)];
#pragma unroll
      for (int tile = 0; tile < 8; ++tile) {
        sum[i / 2][tile][i % 2 * 2] *= scale;
        sum[i / 2][tile][i % 2 * 2 + 1] *= scale;
      }
    }
  }
  add_low_rank(p, w, at, warp, sum);
#pragma unroll
  for (int t = 0; t < 2; ++t) {
#pragma unroll
    for (int tile = 0; tile < 8; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t m = at.token + warp.token + t * 16 + i / 2 * 8 + warp.row;
        const int64_t n = int64_t{at.panel + warp.panel} * kPanel + tile * 8 + warp.q * 2 + i % 2;
        if (m < p.m && n < w.n) store(p.y, p.y_dtype, m * w.n + n, sum[t][tile][i] + w.bias[n]);
      }
    }
  }
}

}  // namespace
}  // namespace sm80

Status linear_sm80(const Linear& p, void* stream) {
  if (!p.m) return nullptr;
  const Weight& w = *p.w;
  const dim3 grid(static_cast<unsigned>((w.n + sm80::kOutputs - 1) / sm80::kOutputs),
                  static_cast<unsigned>((p.m + sm80::kTokens - 1) / sm80::kTokens));
  if (grid.y > 65535) return "more than 8 million tokens in one call";
  const auto at = static_cast<cudaStream_t>(stream);
  if (p.mode == ActMode::int8) {
    sm80::linear_s8_kernel<false><<<grid, sm80::kThreads, 0, at>>>(p, w);
  } else {
    sm80::linear_s8_kernel<true><<<grid, sm80::kThreads, 0, at>>>(p, w);
  }
  return sm80::launched();
}

}  // namespace nibble
