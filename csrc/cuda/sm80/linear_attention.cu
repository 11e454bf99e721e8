// SANA's attention: out = (sum_n v_n relu(k_n)^T) relu(q) / (sum_n relu(k_n) . relu(q) + epsilon), 32 elements a head.
//
// One kernel sums runs of tokens, another adds the runs in their order and applies them, so the same input always gives
// the same bits. Everything between the 16-bit ends is float32.
#include "../kernels.h"

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

namespace nibble {
namespace {

constexpr int kThreads = 128, kHead = 32;
constexpr int kChunk = 64;                         // tokens in shared memory at a time
constexpr int kSums = (kHead + 1) * kHead;         // v relu(k)^T, [k][v], then the sum of relu(k)
constexpr int kWords = kHead * 2 / sizeof(uint4);  // of a head's row

__device__ inline void unpack_eight(const uint4& raw, float (&v)[8]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = __uint_as_float(words[i] << 16);
    v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

__device__ inline uint32_t pack_two(float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(v);
}

// Row of q (part 0), k (1) or v (2) of a head.
__device__ inline const uint4* row_of(const LinearAttention& p, int sample, int64_t token, int part, int head) {
  const int64_t width = int64_t{p.heads} * kHead, at = (sample * p.tokens + token) * 3 * width;
  return reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.qkv) + at + part * width + head * kHead);
}

// Rows of k and v of a chunk of tokens to shared memory; zeros past the end.
__device__ inline void load_chunk(const LinearAttention& p, int sample, int head, int64_t from, int64_t end,
                                  float (&k)[kChunk][kHead], float (&v)[kChunk][kHead]) {
  for (int i = threadIdx.x; i < kChunk * kWords; i += kThreads) {
    const int t = i / kWords, word = i % kWords;
    const bool real = from + t < end;
    float keys[8], values[8];
    unpack_eight(real ? row_of(p, sample, from + t, 1, head)[word] : uint4{}, keys);
    unpack_eight(real ? row_of(p, sample, from + t, 2, head)[word] : uint4{}, values);
#pragma unroll
    for (int j = 0; j < 8; ++j) keys[j] = fmaxf(keys[j], 0.0f);
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      *reinterpret_cast<float4*>(&k[t][word * 8 + j]) = {keys[j], keys[j + 1], keys[j + 2], keys[j + 3]};
      *reinterpret_cast<float4*>(&v[t][word * 8 + j]) = {values[j], values[j + 1], values[j + 2], values[j + 3]};
    }
  }
}

// A block sums a run of tokens of one head. A thread has four elements of k and two of v.
__global__ void __launch_bounds__(kThreads) sum_kernel(const __grid_constant__ LinearAttention p) {
  __shared__ __align__(16) float k[kChunk][kHead], v[kChunk][kHead];
  const int run = blockIdx.x, head = blockIdx.y, sample = blockIdx.z;
  const int key = static_cast<int>(threadIdx.x) / 16 * 4, value = static_cast<int>(threadIdx.x) % 16 * 2;
  const int64_t first = run * p.run, end = first + p.run < p.tokens ? first + p.run : p.tokens;
  float sum[4][2] = {}, keys[4] = {};
  for (int64_t from = first; from < end; from += kChunk) {
    __syncthreads();
    load_chunk(p, sample, head, from, end, k, v);
    __syncthreads();
#pragma unroll 8
    for (int t = 0; t < kChunk; ++t) {
      const float4 a = *reinterpret_cast<const float4*>(&k[t][key]);
      const float2 b = *reinterpret_cast<const float2*>(&v[t][value]);
      const float mine[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum[i][0] = fmaf(mine[i], b.x, sum[i][0]), sum[i][1] = fmaf(mine[i], b.y, sum[i][1]);
        keys[i] += mine[i];
      }
    }
  }
  float* to = p.sums + ((int64_t{sample} * p.heads + head) * gridDim.x + run) * kSums;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    *reinterpret_cast<float2*>(to + (key + i) * kHead + value) = {sum[i][0], sum[i][1]};
    if (value == 0) to[kHead * kHead + key + i] = keys[i];
  }
}

// A block applies the sums of one head to kThreads tokens, one a thread.
__global__ void __launch_bounds__(kThreads) apply_kernel(const __grid_constant__ LinearAttention p, int runs) {
  __shared__ __align__(16) float sums[kSums];
  const int head = blockIdx.y, sample = blockIdx.z;
  const float* from = p.sums + (int64_t{sample} * p.heads + head) * runs * kSums;
  for (int i = threadIdx.x; i < kSums; i += kThreads) {
    float sum = 0.0f;
    for (int run = 0; run < runs; ++run) sum += from[int64_t{run} * kSums + i];
    sums[i] = sum;
  }
  __syncthreads();
  const int64_t token = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (token >= p.tokens) return;
  const uint4* query = row_of(p, sample, token, 0, head);
  float out[kHead] = {}, weight = 0.0f;
#pragma unroll
  for (int word = 0; word < kWords; ++word) {
    float q[8];
    unpack_eight(query[word], q);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float by = fmaxf(q[j], 0.0f);
      const float* row = sums + (word * 8 + j) * kHead;
      weight = fmaf(by, sums[kHead * kHead + word * 8 + j], weight);
#pragma unroll
      for (int i = 0; i < kHead; i += 4) {
        const float4 a = *reinterpret_cast<const float4*>(row + i);
        out[i] = fmaf(by, a.x, out[i]), out[i + 1] = fmaf(by, a.y, out[i + 1]);
        out[i + 2] = fmaf(by, a.z, out[i + 2]), out[i + 3] = fmaf(by, a.w, out[i + 3]);
      }
    }
  }
  const float scale = 1.0f / (weight + p.epsilon);
  auto* to = reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(p.out) +
                                      ((sample * p.tokens + token) * p.heads + head) * kHead);
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const float* o = out + i * 8;
    to[i] = {pack_two(o[0] * scale, o[1] * scale), pack_two(o[2] * scale, o[3] * scale),
             pack_two(o[4] * scale, o[5] * scale), pack_two(o[6] * scale, o[7] * scale)};
  }
}

}  // namespace

Status linear_attention_sm80(const LinearAttention& p, void* stream) {
  if (!p.batch || !p.heads || !p.tokens) return nullptr;
  if (p.run < 1) return "a run of tokens is empty";
  const auto at = static_cast<cudaStream_t>(stream);
  const auto runs = static_cast<unsigned>((p.tokens + p.run - 1) / p.run);
  const auto heads = static_cast<unsigned>(p.heads), batch = static_cast<unsigned>(p.batch);
  sum_kernel<<<dim3(runs, heads, batch), kThreads, 0, at>>>(p);
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const auto blocks = static_cast<unsigned>((p.tokens + kThreads - 1) / kThreads);
  apply_kernel<<<dim3(blocks, heads, batch), kThreads, 0, at>>>(p, static_cast<int>(runs));
  error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace nibble
