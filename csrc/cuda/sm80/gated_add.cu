// The end of a branch: x + gate * (y [+ y2]), rounded once.
#include "../kernels.h"

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

namespace nibble {
namespace {

constexpr int kThreads = 256;

__device__ inline void add_two(uint32_t word, float (&to)[2]) {
  to[0] += __uint_as_float(word << 16);
  to[1] += __uint_as_float(word & 0xffff0000u);
}

__device__ inline uint32_t gated(uint32_t x, uint32_t gate, uint32_t y, uint32_t y2) {
  float sum[2] = {}, by[2] = {}, at[2] = {};
  add_two(y, sum);
  add_two(y2, sum);
  add_two(gate, by);
  add_two(x, at);
  const __nv_bfloat162 out = __floats2bfloat162_rn(fmaf(by[0], sum[0], at[0]), fmaf(by[1], sum[1], at[1]));
  return reinterpret_cast<const uint32_t&>(out);
}

__global__ void __launch_bounds__(kThreads) gated_add_kernel(const __grid_constant__ GatedAdd p) {
  const int64_t vectors = p.k / 8, index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= p.m * vectors) return;
  const int64_t row = index / vectors, at = index % vectors;
  const int64_t gate_row = row / p.tokens_per_sample * p.gate_stride;
  const uint4 x = static_cast<const uint4*>(p.x)[index], y = static_cast<const uint4*>(p.y)[index];
  const uint4 y2 = p.y2 ? static_cast<const uint4*>(p.y2)[index] : uint4{};
  const uint4 gate = *reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.gate) + gate_row + at * 8);
  static_cast<uint4*>(p.out)[index] = {gated(x.x, gate.x, y.x, y2.x), gated(x.y, gate.y, y.y, y2.y),
                                       gated(x.z, gate.z, y.z, y2.z), gated(x.w, gate.w, y.w, y2.w)};
}

}  // namespace

Status gated_add_sm80(const GatedAdd& p, void* stream) {
  const int64_t threads = p.m * (p.k / 8);
  if (!threads) return nullptr;
  const auto blocks = static_cast<unsigned>((threads + kThreads - 1) / kThreads);
  gated_add_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace nibble
