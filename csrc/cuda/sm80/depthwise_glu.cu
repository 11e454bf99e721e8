// The middle of SANA's feed-forward: SiLU, a 3x3 convolution of each channel with itself, and the gate.
//
// A thread owns two channels and their two gates, and walks along a row of pixels. Each column of three pixels that it
// reads adds to three outputs at once, so that a value is read, and put through SiLU, three times in all (once a row).
#include "../kernels.h"

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

namespace nibble {
namespace {

constexpr int kThreads = 128;
constexpr int kStrip = 16;  // pixels of a row, a thread

// v sigmoid(v), by the special function unit's tanh: right to 2^-11.
__device__ inline float silu(float v) {
  const float half = 0.5f * v;
  float t;
  asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(half));
  return fmaf(half, t, half);
}

__device__ inline float2 unpack(uint32_t word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}

__device__ inline void multiply_add(float2& sum, float2 a, float2 b) {
  sum.x = fmaf(a.x, b.x, sum.x), sum.y = fmaf(a.y, b.y, sum.y);
}

// The weights and the bias of two channels.
struct Filter {
  float2 weight[9], bias;

  __device__ Filter(const DepthwiseGlu& p, int channel) {
    const auto* from = static_cast<const __nv_bfloat16*>(p.weight) + int64_t{channel} * 9;
    const auto* biases = static_cast<const __nv_bfloat16*>(p.bias) + channel;
#pragma unroll
    for (int i = 0; i < 9; ++i) weight[i] = {__bfloat162float(from[i]), __bfloat162float(from[9 + i])};
    bias = {__bfloat162float(biases[0]), __bfloat162float(biases[1])};
  }
};

// Three outputs under way, the oldest first.
struct Sums {
  float2 at[3];

  __device__ void add(const Filter& f, int row, float2 v) {
    multiply_add(at[0], f.weight[row * 3 + 2], v);
    multiply_add(at[1], f.weight[row * 3 + 1], v);
    multiply_add(at[2], f.weight[row * 3], v);
  }
  __device__ void next(const Filter& f) { at[0] = at[1], at[1] = at[2], at[2] = f.bias; }
};

__global__ void __launch_bounds__(kThreads) depthwise_glu_kernel(const __grid_constant__ DepthwiseGlu p) {
  const int channel = static_cast<int>(blockIdx.x * kThreads + threadIdx.x) * 2;
  const int row = static_cast<int>(blockIdx.y), y = row % p.height, first = static_cast<int>(blockIdx.z) * kStrip;
  if (channel >= p.padded) return;
  auto* out = static_cast<__nv_bfloat16*>(p.out) + int64_t{row} * p.width * p.padded + channel;
  const int last = min(first + kStrip, p.width);
  if (channel >= p.channels) {
    for (int x = first; x < last; ++x) *reinterpret_cast<uint32_t*>(out + int64_t{x} * p.padded) = 0;
    return;
  }
  const int64_t pitch = int64_t{2} * p.channels;
  const auto* in = static_cast<const __nv_bfloat16*>(p.x) + int64_t{row} * p.width * pitch + channel;
  const Filter value(p, channel), gate(p, p.channels + channel);
  Sums values{}, gates{};
  values.next(value), gates.next(gate);
#pragma unroll 2
  for (int x = first - 1; x <= last; ++x) {
    uint32_t words[3][2] = {};
#pragma unroll
    for (int r = 0; r < 3; ++r) {
      if (x < 0 || x >= p.width || y + r < 1 || y + r > p.height) continue;
      const auto* from = in + (int64_t{r - 1} * p.width + x) * pitch;
      words[r][0] = *reinterpret_cast<const uint32_t*>(from);
      words[r][1] = *reinterpret_cast<const uint32_t*>(from + p.channels);
    }
#pragma unroll
    for (int r = 0; r < 3; ++r) {
      const float2 v = unpack(words[r][0]), g = unpack(words[r][1]);
      values.add(value, r, {silu(v.x), silu(v.y)});
      gates.add(gate, r, {silu(g.x), silu(g.y)});
    }
    if (x > first) {
      const float2 v = values.at[0], g = gates.at[0];
      const __nv_bfloat162 both = __floats2bfloat162_rn(v.x * silu(g.x), v.y * silu(g.y));
      *reinterpret_cast<__nv_bfloat162*>(out + int64_t{x - 1} * p.padded) = both;
    }
    values.next(value), gates.next(gate);
  }
}

}  // namespace

Status depthwise_glu_sm80(const DepthwiseGlu& p, void* stream) {
  if (!p.batch || !p.height || !p.width || !p.padded) return nullptr;
  const auto blocks = static_cast<unsigned>((p.padded / 2 + kThreads - 1) / kThreads);
  const auto strips = static_cast<unsigned>((p.width + kStrip - 1) / kStrip);
  const dim3 grid(blocks, static_cast<unsigned>(p.batch * p.height), strips);
  depthwise_glu_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace nibble
