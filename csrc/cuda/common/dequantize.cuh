// Dense 16-bit weights from INT4 codes: what a path without a 4-bit kernel multiplies with.
//
// A thread widens 16 codes (8 bytes in, 32 bytes out) of one row; 16 codes never cross a group of 64, so it reads one
// scale. The product is rounded once, from fp32. Bound by memory: 2.5 bytes a weight.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../kernels.h"

namespace nibble {
namespace {  // each architecture's file has its own copy: the linker must never take one for another

constexpr int kCodesPerThread = 16, kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads)
    dequantize_int4_kernel(const uint2* __restrict__ codes, const T* __restrict__ scales, uint4* __restrict__ out,
                           int64_t count) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i >= count) return;
  const float scale = static_cast<float>(scales[i / (kGroup / kCodesPerThread)]);
  const uint2 packed = codes[i];
  alignas(16) T values[kCodesPerThread];
#pragma unroll
  for (int j = 0; j < kCodesPerThread; ++j) {
    const int word = static_cast<int>(j < 8 ? packed.x : packed.y);
    const int code = word << (28 - 4 * (j % 8)) >> 28;  // the shift back brings the sign down
    values[j] = static_cast<T>(static_cast<float>(code) * scale);
  }
  out[2 * i] = reinterpret_cast<const uint4*>(values)[0];
  out[2 * i + 1] = reinterpret_cast<const uint4*>(values)[1];
}

template <class T>
Status launch_dequantize_int4(const DequantizeInt4& p, void* stream) {
  const int64_t count = p.n * p.k / kCodesPerThread;
  const auto blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  dequantize_int4_kernel<T><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      reinterpret_cast<const uint2*>(p.codes), reinterpret_cast<const T*>(p.scales), reinterpret_cast<uint4*>(p.out),
      count);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

Status dequantize_int4(const DequantizeInt4& p, void* stream) {
  if (p.dtype == DType::bf16) return launch_dequantize_int4<__nv_bfloat16>(p, stream);
  if (p.dtype == DType::fp16) return launch_dequantize_int4<__half>(p, stream);
  return "dequantize_int4 writes bfloat16 or float16";
}

}  // namespace
}  // namespace nibble
