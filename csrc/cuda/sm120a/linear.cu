// The NVFP4 linear of consumer Blackwell (RTX 50): the matrix units take e2m1 codes with their e4m3 scales as they are.
// Compiled and checked by emulation, never run on such a card.
//
// A block multiplies 128 tokens with 128 outputs, 64 inputs at a time, through four stages of shared memory. Tokens lie
// in rows, whose 16 bytes ldmatrix deals to lanes; weights lie as lanes read them (engine/ops/mma64.py). A scale word
// holds four groups of 16. The unit takes the scales of token row r from lane 4 (r % 8) + r / 8, those of output n from
// lane 4 n (byte and thread 0 of the selectors); other lanes of four hold copies, so that any thread would do.
#include "../sm80/common.cuh"

namespace nibble {
namespace sm120a {
namespace {

using sm80::multiply_16;

constexpr int kThreads = 256, kTokens = 128, kOutputs = 128, kStages = 4;
constexpr int kPanels = kOutputs / kPanel;
constexpr int kRowBytes = kGroup / 2;               // 64 inputs of a token
constexpr int kPanelBytes = kPanel * kGroup / 2;    // 64 inputs of 16 outputs
constexpr int kPanelScales = kPanel * kGroup / 16;  // and their scales
constexpr int kScaleSteps = 4;                      // stages that 16 bytes of a token's scales serve

struct Shared {
  uint8_t tokens[kStages][kTokens * kRowBytes];
  uint8_t codes[kStages][kPanels * kPanelBytes];
  uint8_t scales[kStages][kPanels * kPanelScales];
  uint8_t token_scales[2][kTokens * kScaleSteps * 4];
};

__device__ inline uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

__device__ inline void copy_16(void* to, const void* from, bool real) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(real ? 16 : 0)
               : "memory");
}

// Where half (0 or 1) of a token's 32 bytes lies: rows four apart swap halves, which keeps eight rows off each other's
// banks.
__device__ inline int token_byte(int row, int half) {
  return row * kRowBytes + (half ^ (row / 4 & 1)) * 16;
}

// The 16x64 codes of tokens, from eight rows' 16 bytes four times: rows 0..7 and 8..15 of inputs 0..31, then of 32..63.
__device__ inline void load_tokens(const uint8_t* tokens, int first, int lane, uint32_t (&a)[4]) {
  const uint32_t at = shared_address(tokens + token_byte(first + lane % 16, lane / 16));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(at)
               : "memory");
}

// d (16,8) += a (16,64) b (64,8), each 16 inputs of a row and of a column times their scales.
__device__ inline void multiply_fp4(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, uint32_t scale_a,
                                    uint32_t scale_b) {
  asm("mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::4X.m16n8k64.row.col.f32.e2m1.e2m1.f32.ue4m3 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3}, %10, {0, 0}, %11, {0, 0};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(scale_a), "r"(scale_b));
}

// Where a block works: its first token and panel.
struct Place {
  int64_t token;
  int panel, panels, steps;
};

// 64 inputs of the block's tokens and weights on their way into a stage. What lies past an edge is zero.
__device__ inline void fetch(const LinearFp4& p, const WeightFp4& w, const Place& at, Shared& shared, int step) {
  const int thread = threadIdx.x, stage = step % kStages;
  const auto token = [&](int row) { return at.token + row < p.m ? at.token + row : 0; };
  const auto block = [&](int panel) {
    return int64_t{at.panel + panel < at.panels ? at.panel + panel : 0} * at.steps + step;
  };
  const int row = thread / 2, half = thread % 2, panel = thread / 32, piece = thread % 32 * 16;
  copy_16(&shared.tokens[stage][token_byte(row, half)], p.codes + token(row) * (w.k / 2) + step * kRowBytes + half * 16,
          at.token + row < p.m);
  copy_16(&shared.codes[stage][panel * kPanelBytes + piece], w.codes + block(panel) * kPanelBytes + piece,
          at.panel + panel < at.panels);
  if (thread < kPanels * kPanelScales / 16) {
    const int of = thread / 4, part = thread % 4 * 16;
    copy_16(&shared.scales[stage][of * kPanelScales + part], w.scales + block(of) * kPanelScales + part,
            at.panel + of < at.panels);
  }
  if (step % kScaleSteps == 0 && thread >= kThreads - kTokens) {
    const int of = thread - (kThreads - kTokens);
    copy_16(&shared.token_scales[step / kScaleSteps % 2][of * kScaleSteps * 4],
            p.scales + token(of) * p.scale_stride + step * 4, at.token + of < p.m);
  }
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

__device__ inline void multiply(const Shared& shared, int step, const Warp& warp, Sums& sum) {
  const int stage = step % kStages;
  uint32_t a[2][4], scale[2];
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const int first = warp.token + t * 16, row = first + warp.row + warp.lane % 2 * 8;
    load_tokens(shared.tokens[stage], first, warp.lane, a[t]);
    const auto* words = reinterpret_cast<const uint32_t*>(shared.token_scales[step / kScaleSteps % 2]);
    scale[t] = words[row * kScaleSteps + step % kScaleSteps];
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int panel = warp.panel + j;
    const uint4 b = reinterpret_cast<const uint4*>(&shared.codes[stage][panel * kPanelBytes])[warp.lane];
    const uint2 by = reinterpret_cast<const uint2*>(&shared.scales[stage][panel * kPanelScales])[warp.row];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      multiply_fp4(sum[t][j * 2], a[t], b.x, b.y, scale[t], by.x);
      multiply_fp4(sum[t][j * 2 + 1], a[t], b.z, b.w, scale[t], by.y);
    }
  }
}

// sum *= factor, the tensor scale times the row factor.
__device__ inline void apply_factors(const WeightFp4& w, const Place& at, const Warp& warp, Sums& sum) {
#pragma unroll
  for (int tile = 0; tile < 8; ++tile) {
    const int panel = min(at.panel + warp.panel + tile / 2, at.panels - 1);
    const float2 by = *reinterpret_cast<const float2*>(w.factor + panel * kPanel + tile % 2 * 8 + warp.q * 2);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i / 4][tile][i % 4] *= i % 2 ? by.y : by.x;
  }
}

template <class T>
__device__ inline uint32_t rounded_pair(float2 v) {
  if constexpr (__is_same(T, __half)) {
    const __half2 pair = __floats2half2_rn(v.x, v.y);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(v.x, v.y);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

// sum += low_rank x up, 16 ranks at a time.
template <class T>
__device__ inline void add_low_rank(const LinearFp4& p, const WeightFp4& w, const Place& at, const Warp& warp,
                                    Sums& sum) {
  const int tiles = static_cast<int>(w.rank / 16);
#pragma unroll 1
  for (int r = 0; r < tiles; ++r) {
    uint32_t a[2][4];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int64_t m = min(at.token + warp.token + i / 4 * 16 + i % 2 * 8 + warp.row, p.m - 1);
      const float* from = p.low_rank + m * w.rank + r * 16 + i / 2 % 2 * 8 + warp.q * 2;
      a[i / 4][i % 4] = rounded_pair<T>(*reinterpret_cast<const float2*>(from));
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t panel = min(at.panel + warp.panel + j, at.panels - 1);
      const uint4 b = reinterpret_cast<const uint4*>(w.up)[(panel * tiles + r) * 32 + warp.lane];
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        multiply_16<T>(sum[t][j * 2], a[t], b.x, b.y);
        multiply_16<T>(sum[t][j * 2 + 1], a[t], b.z, b.w);
      }
    }
  }
}

// v sigmoid(2 u) with u = sqrt(2 / pi) (v + 0.044715 v^3): GELU in its tanh form, right to fp32's last few bits.
__device__ inline float gelu(float v) {
  const float u = v * fmaf(0.0356774081f, v * v, 0.7978845608f);
  return __fdividef(v, 1.0f + __expf(-2.0f * u));
}

// y[at] and y[at + 1]; at is even, and so is N.
__device__ inline void store_pair(void* y, DType dtype, int64_t at, float2 v) {
  if (dtype == DType::fp32) {
    *reinterpret_cast<float2*>(static_cast<float*>(y) + at) = v;
  } else {
    static_cast<uint32_t*>(y)[at / 2] = dtype == DType::bf16 ? rounded_pair<__nv_bfloat16>(v) : rounded_pair<__half>(v);
  }
}

__device__ inline void write(const LinearFp4& p, const WeightFp4& w, const Place& at, const Warp& warp,
                             const Sums& sum) {
#pragma unroll
  for (int tile = 0; tile < 8; ++tile) {
    const int64_t n = int64_t{at.panel + warp.panel} * kPanel + tile * 8 + warp.q * 2;
    if (n >= w.n) continue;
    const float2 bias = *reinterpret_cast<const float2*>(w.bias + n);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t m = at.token + warp.token + i * 8 + warp.row;
      if (m >= p.m) continue;
      const float* from = &sum[i / 2][tile][i % 2 * 2];
      float2 v = {from[0] + bias.x, from[1] + bias.y};
      if (p.gelu) v = {gelu(v.x), gelu(v.y)};
      if (w.n % 2 == 0) {
        store_pair(p.y, p.y_dtype, m * w.n + n, v);
      } else {
        sm80::store(p.y, p.y_dtype, m * w.n + n, v.x);
        if (n + 1 < w.n) sm80::store(p.y, p.y_dtype, m * w.n + n + 1, v.y);
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) linear_fp4_kernel(const LinearFp4 p, const WeightFp4 w) {
  __shared__ __align__(16) Shared shared;
  const Place at{int64_t{blockIdx.y} * kTokens, static_cast<int>(blockIdx.x) * kPanels,
                 static_cast<int>((w.n + kPanel - 1) / kPanel), static_cast<int>(w.k / kGroup)};
  const Warp warp;
  Sums sum = {};
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < at.steps) fetch(p, w, at, shared, step);
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  for (int step = 0; step < at.steps; ++step) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
    __syncthreads();  // this step is here for all, and all are done with the stage that is filled next
    if (step + kStages - 1 < at.steps) fetch(p, w, at, shared, step + kStages - 1);
    asm volatile("cp.async.commit_group;" ::: "memory");
    multiply(shared, step, warp, sum);
  }
  apply_factors(w, at, warp, sum);
  add_low_rank<T>(p, w, at, warp, sum);
  write(p, w, at, warp, sum);
}

}  // namespace
}  // namespace sm120a

Status linear_sm120a(const LinearFp4& p, void* stream) {
  if (!p.m) return nullptr;
  const WeightFp4& w = *p.w;
  const dim3 grid(static_cast<unsigned>((w.n + sm120a::kOutputs - 1) / sm120a::kOutputs),
                  static_cast<unsigned>((p.m + sm120a::kTokens - 1) / sm120a::kTokens));
  if (grid.y > 65535) return "more than 8 million tokens in one call";
  const auto at = static_cast<cudaStream_t>(stream);
  if (w.dtype == DType::bf16) {
    sm120a::linear_fp4_kernel<__nv_bfloat16><<<grid, sm120a::kThreads, 0, at>>>(p, w);
  } else {
    sm120a::linear_fp4_kernel<__half><<<grid, sm120a::kThreads, 0, at>>>(p, w);
  }
  return sm80::launched();
}

}  // namespace nibble
