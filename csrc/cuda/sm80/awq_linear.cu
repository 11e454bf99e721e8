// The weight-only linear (W4A16) for few tokens: bound by reading the weights, which are widened on the way.
//
// A block takes a panel of 16 outputs, its warps groups of 64 inputs in turns: 512 bytes of codes, 16 a lane, which are
// four outputs of eight inputs. The lanes' and warps' sums meet in a fixed order. More than eight tokens take more
// blocks, which read the weights again. Many layers of the same tokens are one launch, whose blocks do the very same.
#include "common.cuh"

namespace nibble {
namespace sm80 {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * 32;

// Groups whose weights a warp has on their way. The next ones are asked for an iteration before they are used, since
// within one the compiler puts each load beside its use. With six blocks of one token on a multiprocessor that is up to
// 41 KB; about 25 cover the memory's latency at its full rate.
template <int kTokens>
constexpr int kAhead = kTokens == 1 ? 3 : 1;

// What a lane reads of a group: four outputs of eight inputs, and those outputs' scales and zeros.
struct Piece {
  uint4 codes;
  uint2 scales, zeros;
};

// Weights are read once: L1 is left to the tokens.
__device__ inline uint4 read_once(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}
__device__ inline uint2 read_once(const uint2* from) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
  return v;
}

// 0..15 as a float, exactly: up to bit 19 a code becomes the last bits of a mantissa where it stands, which saves most
// shifts, and 2^(23 - shift) goes again. A conversion takes four times as long. One instruction does both of `and` and
// `or` if one of the constants is in a register, which the compiler does not see by itself.
__device__ inline float code_at(uint32_t word, int shift) {
  if (shift > 16) word >>= 16, shift -= 16;
  const uint32_t lifted = (150u - shift) << 23;
  uint32_t bits;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(bits) : "r"(word), "r"(15u << shift), "r"(lifted));
  return __uint_as_float(bits) - __uint_as_float(lifted);
}

// The 16-bit values of four neighbouring outputs.
__device__ inline void widen_four(uint2 raw, DType dtype, float (&to)[4]) {
  const uint32_t words[2] = {raw.x, raw.y};
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = widen(words[i / 2] >> (i % 2 * 16) & 0xffffu, dtype);
}

// Sums over the eight lanes that hold the same outputs (lane % 4).
__device__ inline float over_lanes(float sum) {
#pragma unroll
  for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  return sum;
}

// sum[t][o] += a lane's part of a group's product; x[t] + at: its eight inputs of token t.
template <int kTokens, DType kScales>
__device__ inline void multiply(float (&sum)[kTokens][4], const Piece& piece, const float4* const (&x)[kTokens],
                                int at) {
  const uint32_t words[4] = {piece.codes.x, piece.codes.y, piece.codes.z, piece.codes.w};
  float scale[4], zero[4], w[4][8];
  widen_four(piece.scales, kScales, scale);
  widen_four(piece.zeros, kScales, zero);
#pragma unroll
  for (int o = 0; o < 4; ++o) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {  // low nibbles are inputs 0..3, high nibbles 4..7
      w[o][j] = fmaf(code_at(words[o], j % 4 * 8 + j / 4 * 4), scale[o], zero[o]);
    }
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const float4 a = x[t][at], b = x[t][at + 1];
    const float v[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int o = 0; o < 4; ++o) {
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[t][o] = fmaf(w[o][j], v[j], sum[t][o]);
    }
  }
}

// A warp's sums over its groups, in their order.
template <int kTokens, DType kScales>
__device__ inline void sum_groups(float (&sum)[kTokens][4], const AwqLinear& p, int64_t panel, int64_t first) {
  constexpr int kAll = kAhead<kTokens>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, groups = static_cast<int>(p.k / kGroup);
  const int64_t begin = panel * groups + warp;  // the warp's first group, and from it on:
  const auto* codes = reinterpret_cast<const uint4*>(p.codes) + begin * 32 + lane;
  const auto* scales = reinterpret_cast<const uint2*>(p.scales) + begin * 4 + lane % 4;
  const auto* zeros = reinterpret_cast<const uint2*>(p.zeros) + begin * 4 + lane % 4;
  const float4* x[kTokens];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    x[t] = reinterpret_cast<const float4*>(p.x + min(first + t, p.m - 1) * p.x_stride + warp * kGroup + lane / 4 * 8);
  }
  const auto fetch = [&](int i) {
    return Piece{read_once(codes + i * kWarps * 32), read_once(scales + i * kWarps * 4),
                 read_once(zeros + i * kWarps * 4)};
  };
  const auto use = [&](const Piece& piece, int i) { multiply<kTokens, kScales>(sum, piece, x, i * kWarps * 16); };
  const auto go_on = [&](int i) {
    codes += i * kWarps * 32, scales += i * kWarps * 4, zeros += i * kWarps * 4;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) x[t] += i * kWarps * 16;
  };
  int left = (groups - warp + kWarps - 1) / kWarps;
  Piece next[kAll];
#pragma unroll
  for (int i = 0; i < kAll; ++i) {
    if (i < left) next[i] = fetch(i);
  }
  for (; left >= 2 * kAll; left -= kAll) {
#pragma unroll
    for (int i = 0; i < kAll; ++i) {
      const Piece piece = next[i];
      next[i] = fetch(kAll + i);
      use(piece, i);
    }
    go_on(kAll);
  }
#pragma unroll
  for (int i = 0; i < kAll; ++i) {
    if (i < left) use(next[i], i);
  }
  // What is left where a warp's groups are no multiple of kAhead.
  for (left -= kAll, go_on(kAll); left > 0; --left, go_on(1)) use(fetch(0), 0);
}

// y of a panel of outputs, and of kTokens tokens from `first` on.
template <int kTokens>
__device__ inline void multiply_panel(const AwqLinear& p, int64_t panel, int64_t first) {
  __shared__ float partial[kTokens][kWarps][kPanel];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, outputs = lane % 4 * 4;
  float sum[kTokens][4] = {};
  if (p.scale_dtype == DType::bf16) {
    sum_groups<kTokens, DType::bf16>(sum, p, panel, first);
  } else {
    sum_groups<kTokens, DType::fp16>(sum, p, panel, first);
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
#pragma unroll
    for (int o = 0; o < 4; ++o) {
      const float all = over_lanes(sum[t][o]);
      if (lane < 4) partial[t][warp][outputs + o] = all;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kTokens * kPanel; i += kThreads) {
    const int64_t m = first + i / kPanel, n = panel * kPanel + i % kPanel;
    float all = 0.0f;
#pragma unroll
    for (int from = 0; from < kWarps; ++from) all += partial[i / kPanel][from][i % kPanel];
    if (m < p.m && n < p.n) store(p.y, p.y_dtype, m * p.n + n, all + p.bias[n]);
  }
}

template <int kTokens>
__global__ void __launch_bounds__(kThreads) awq_linear_kernel(const AwqLinear p) {
  multiply_panel<kTokens>(p, blockIdx.x, int64_t{blockIdx.y} * kTokens);
}

// Each block finds its layer: the last one that begins at its panel or before.
template <int kTokens>
__global__ void __launch_bounds__(kThreads) awq_linears_kernel(const __grid_constant__ AwqLinears p) {
  const int panel = static_cast<int>(blockIdx.x);
  int low = 0, high = p.layers;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (p.layer[middle].first_panel <= panel)
      low = middle;
    else
      high = middle;
  }
  const AwqLayer& layer = p.layer[low];
  const uint8_t* const at = layer.codes;
  const AwqLinear one{at,
                      reinterpret_cast<const uint16_t*>(at + layer.scales),
                      reinterpret_cast<const uint16_t*>(at + layer.zeros),
                      reinterpret_cast<const float*>(at + layer.bias),
                      layer.n,
                      p.k,
                      layer.scale_dtype,
                      p.x,
                      p.m,
                      p.x_stride,
                      layer.y,
                      p.y_dtype};
  multiply_panel<kTokens>(one, panel - layer.first_panel, int64_t{blockIdx.y} * kTokens);
}

int64_t panels_of(int64_t n) {
  return (n + kPanel - 1) / kPanel;
}

// Has `launch` start the blocks that so many tokens and panels take: of 1, 4 or 8 tokens.
template <class Launch>
Status for_tokens(int64_t m, int64_t panels, const Launch& launch) {
  if (!m || !panels) return nullptr;
  const int tokens = m == 1 ? 1 : m <= 4 ? 4 : 8;
  const dim3 grid(static_cast<unsigned>(panels), static_cast<unsigned>((m + tokens - 1) / tokens));
  if (grid.y > 65535) return "more than half a million tokens in one call of a weight-only linear";
  launch(tokens, grid);
  return launched();
}

}  // namespace
}  // namespace sm80

Status awq_linear_sm80(const AwqLinear& p, void* stream) {
  const auto at = static_cast<cudaStream_t>(stream);
  return sm80::for_tokens(p.m, sm80::panels_of(p.n), [&](int tokens, dim3 grid) {
    if (tokens == 1) sm80::awq_linear_kernel<1><<<grid, sm80::kThreads, 0, at>>>(p);
    if (tokens == 4) sm80::awq_linear_kernel<4><<<grid, sm80::kThreads, 0, at>>>(p);
    if (tokens == 8) sm80::awq_linear_kernel<8><<<grid, sm80::kThreads, 0, at>>>(p);
  });
}

Status awq_linears_sm80(const AwqLinears& p, void* stream) {
  if (!p.layers) return nullptr;
  const AwqLayer& last = p.layer[p.layers - 1];
  const auto at = static_cast<cudaStream_t>(stream);
  return sm80::for_tokens(p.m, last.first_panel + sm80::panels_of(last.n), [&](int tokens, dim3 grid) {
    if (tokens == 1) sm80::awq_linears_kernel<1><<<grid, sm80::kThreads, 0, at>>>(p);
    if (tokens == 4) sm80::awq_linears_kernel<4><<<grid, sm80::kThreads, 0, at>>>(p);
    if (tokens == 8) sm80::awq_linears_kernel<8><<<grid, sm80::kThreads, 0, at>>>(p);
  });
}

}  // namespace nibble
