// Tokens for Hopper's W4A8 linear, in one read: [x + gate y,] [LayerNorm and modulation,] smoothing, e4m3 with one scale a
// token, and the projection onto the low-rank branch. One pass serves up to two linears that read the same tokens.
//
// A cluster of CTAs takes 32 tokens; each CTA keeps its slice of their inputs in shared memory. What needs a whole row
// (mean, variance, largest value, projection) is summed slice by slice in the order of the cluster's ranks, so a result
// has the same bits whatever runs beside it.
#pragma once
#include "../kernels.h"
#include "ptx.cuh"

namespace nibble::sm90a {

constexpr int kQuantTokens = 32, kQuantThreads = 256, kQuantWarps = kQuantThreads / 32;
constexpr int kRankChunk = 32;      // ranks projected at a time
constexpr float kLargestE4m3 = 448;

struct QuantShared {
  float sums[2][kQuantTokens];          // of a slice: what the other CTAs of the cluster read
  float whole[kQuantTokens];            // of the row
  float spread[kQuantTokens];
  float projected[kQuantTokens][kRankChunk + 1];
};

__device__ inline float read_remote(const float* local, uint32_t cta) {
  float v;
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %1, %2;\n"
      "ld.shared::cluster.f32 %0, [remote];\n}"
      : "=f"(v)
      : "r"(shared_address(local)), "r"(cta)
      : "memory");
  return v;
}

__device__ inline void multiply_16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                   uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ inline void unpack_two(uint32_t word, float& low, float& high) {
  low = __uint_as_float(word << 16);
  high = __uint_as_float(word & 0xffff0000u);
}

__device__ inline uint32_t pack_two(float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(v);
}

__device__ inline void unpack_eight(const uint4& raw, float (&v)[8]) {
  unpack_two(raw.x, v[0], v[1]);
  unpack_two(raw.y, v[2], v[3]);
  unpack_two(raw.z, v[4], v[5]);
  unpack_two(raw.w, v[6], v[7]);
}

__device__ inline uint4 pack_eight(const float (&v)[8]) {
  return {pack_two(v[0], v[1]), pack_two(v[2], v[3]), pack_two(v[4], v[5]), pack_two(v[6], v[7])};
}

__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int step = 16; step; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

__device__ inline float warp_max(float v) {
#pragma unroll
  for (int step = 16; step; step /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, step));
  return v;
}

// Where a CTA stands: its tokens, its slice of the inputs, and its rows in shared memory.
struct Slice {
  const QuantizeFp8& p;
  QuantShared& shared;
  uint8_t* rows;  // kQuantTokens rows of `pitch` bytes
  int slice, first_input, first_token, pitch, clusters, rank, warp, lane;

  __device__ uint4& at(int token, int input) const {
    return *reinterpret_cast<uint4*>(rows + token * pitch + input * 2);
  }
  __device__ int sample(int token) const { return (first_token + token) / p.tokens_per_sample; }
};

// Sums (or largest values) of every row over the cluster, from sums[which] of each CTA into `whole`.
template <bool kLargest>
__device__ void over_cluster(const Slice& s, int which) {
  cluster_sync();
  if (threadIdx.x < kQuantTokens) {
    float all = 0.0f;
    for (int cta = 0; cta < s.clusters; ++cta) {
      const float part = read_remote(&s.shared.sums[which][threadIdx.x], cta);
      all = kLargest ? fmaxf(all, part) : all + part;
    }
    s.shared.whole[threadIdx.x] = all;
  }
  __syncthreads();
}

// Load the slice; with a branch, x + gate (y + y2) goes to memory as well. Leaves row sums in sums[0].
__device__ inline void load_rows(const Slice& s) {
  const QuantizeFp8& p = s.p;
  for (int t = s.warp; t < kQuantTokens; t += kQuantWarps) {
    const int64_t token = s.first_token + t;
    float sum = 0.0f;
    for (int i = s.lane * 8; i < s.slice; i += 256) {
      float v[8] = {};
      if (token < p.m) {
        const int64_t from = token * p.x_stride + s.first_input + i;
        unpack_eight(*reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.x) + from), v);
        if (p.y) {
          const int64_t at = token * p.k + s.first_input + i;
          const auto* gates = static_cast<const __nv_bfloat16*>(p.gate) + s.sample(t) * p.mod_stride;
          float added[8], gate[8];
          unpack_eight(*reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.y) + at), added);
          unpack_eight(*reinterpret_cast<const uint4*>(gates + s.first_input + i), gate);
          if (p.y2) {
            float more[8];
            unpack_eight(*reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.y2) + at), more);
#pragma unroll
            for (int j = 0; j < 8; ++j) added[j] += more[j];
          }
#pragma unroll
          for (int j = 0; j < 8; ++j) v[j] = __bfloat162float(__float2bfloat16_rn(fmaf(gate[j], added[j], v[j])));
          *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(p.x_out) + at) = pack_eight(v);
        }
      }
      s.at(t, i) = pack_eight(v);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum += v[j];
    }
    sum = warp_sum(sum);
    if (s.lane == 0) s.shared.sums[0][t] = sum;
  }
}

// LayerNorm without parameters, then h (1 + scale) + shift, in place.
__device__ inline void normalize_rows(const Slice& s) {
  const QuantizeFp8& p = s.p;
  over_cluster<false>(s, 0);
  for (int t = s.warp; t < kQuantTokens; t += kQuantWarps) {
    const float mean = s.shared.whole[t] / p.k;
    float squares = 0.0f;
    for (int i = s.lane * 8; i < s.slice; i += 256) {
      float v[8];
      unpack_eight(s.at(t, i), v);
#pragma unroll
      for (int j = 0; j < 8; ++j) squares += (v[j] - mean) * (v[j] - mean);
    }
    squares = warp_sum(squares);
    if (s.lane == 0) {
      s.shared.sums[1][t] = squares;
      s.shared.spread[t] = mean;
    }
  }
  over_cluster<false>(s, 1);
  for (int t = s.warp; t < kQuantTokens; t += kQuantWarps) {
    const float mean = s.shared.spread[t], inverse = rsqrtf(s.shared.whole[t] / p.k + p.eps);
    const int64_t row = static_cast<int64_t>(min(s.sample(t), p.samples - 1)) * p.mod_stride + s.first_input;
    for (int i = s.lane * 8; i < s.slice; i += 256) {
      float v[8], scale[8], shift[8];
      unpack_eight(s.at(t, i), v);
      unpack_eight(*reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.scale) + row + i), scale);
      unpack_eight(*reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.shift) + row + i), shift);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = fmaf((v[j] - mean) * inverse, 1.0f + scale[j], shift[j]);
      s.at(t, i) = pack_eight(v);
    }
  }
  __syncthreads();
}

__device__ inline uint32_t four_codes(const float* v, float by) {
  uint32_t packed;
  asm("{\n.reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}"
      : "=r"(packed)
      : "f"(v[0] * by), "f"(v[1] * by), "f"(v[2] * by), "f"(v[3] * by));
  return packed;
}

__device__ inline void smoothed(const Slice& s, const float* inv_smooth, int t, int i, float (&v)[8]) {
  unpack_eight(s.at(t, i), v);
  if (!inv_smooth) return;
  const auto* from = reinterpret_cast<const float4*>(inv_smooth + s.first_input + i);
  const float4 a = from[0], b = from[1];
  v[0] *= a.x, v[1] *= a.y, v[2] *= a.z, v[3] *= a.w, v[4] *= b.x, v[5] *= b.y, v[6] *= b.z, v[7] *= b.w;
}

__device__ inline void write_codes(const Slice& s, const QuantizeTarget& to, int which) {
  for (int t = s.warp; t < kQuantTokens; t += kQuantWarps) {
    float largest = 0.0f;
    for (int i = s.lane * 8; i < s.slice; i += 256) {
      float v[8];
      smoothed(s, to.inv_smooth, t, i, v);
#pragma unroll
      for (int j = 0; j < 8; ++j) largest = fmaxf(largest, fabsf(v[j]));
    }
    largest = warp_max(largest);
    if (s.lane == 0) s.shared.sums[which][t] = largest;
  }
  over_cluster<true>(s, which);
  for (int t = s.warp; t < kQuantTokens; t += kQuantWarps) {
    const int64_t token = s.first_token + t;
    if (token >= s.p.m) continue;
    const float largest = s.shared.whole[t];
    const float by = largest < kTinyMax ? 0.0f : kLargestE4m3 / largest;
    if (s.rank == 0 && s.lane == 0) to.scales[token] = largest < kTinyMax ? 0.0f : largest * (1.0f / kLargestE4m3);
    for (int i = s.lane * 8; i < s.slice; i += 256) {
      float v[8];
      smoothed(s, to.inv_smooth, t, i, v);
      *reinterpret_cast<uint2*>(to.codes + token * s.p.k + s.first_input + i) = {four_codes(v, by),
                                                                                four_codes(v + 4, by)};
    }
  }
}

// Projections of the slice onto 32 ranks: warps take runs of 32 inputs in turns, their sums meet in shared memory.
// The 32 inputs of a run are dealt to the matrix units eight a lane: any order serves, if both operands keep to it.
__device__ inline void project(const Slice& s, const QuantizeTarget& to, int first_rank, float* partial) {
  float d[2][kRankChunk / 8][4] = {};
  const int row = s.lane / 4, run = s.lane % 4 * 8;
  for (int i = s.warp * 32; i < s.slice; i += kQuantWarps * 32) {
    uint4 down[kRankChunk / 8];
#pragma unroll
    for (int j = 0; j < kRankChunk / 8; ++j) {
      const int rank = first_rank + j * 8 + row;
      const auto* from = static_cast<const __nv_bfloat16*>(to.down) + int64_t{rank} * s.p.k + s.first_input + i + run;
      down[j] = rank < to.rank ? *reinterpret_cast<const uint4*>(from) : uint4{};
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const uint4 a = s.at(tile * 16 + row, i + run), b = s.at(tile * 16 + row + 8, i + run);
#pragma unroll
      for (int j = 0; j < kRankChunk / 8; ++j) {
        multiply_16(d[tile][j], a.x, b.x, a.y, b.y, down[j].x, down[j].y);
        multiply_16(d[tile][j], a.z, b.z, a.w, b.w, down[j].z, down[j].w);
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
    for (int j = 0; j < kRankChunk / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = tile * 16 + row + i / 2 * 8, rank = j * 8 + s.lane % 4 * 2 + i % 2;
        partial[(s.warp * kQuantTokens + token) * kRankChunk + rank] = d[tile][j][i];
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kQuantTokens * kRankChunk; i += kQuantThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kQuantWarps; ++warp) sum += partial[warp * kQuantTokens * kRankChunk + i];
    s.shared.projected[i / kRankChunk][i % kRankChunk] = sum;
  }
  cluster_sync();
  // Each CTA finishes some of the tokens.
  const int share = kQuantTokens / s.clusters;
  for (int i = threadIdx.x; i < share * kRankChunk; i += kQuantThreads) {
    const int t = s.rank * share + i / kRankChunk, rank = first_rank + i % kRankChunk;
    const int64_t token = s.first_token + t;
    float sum = 0.0f;
    for (int cta = 0; cta < s.clusters; ++cta) sum += read_remote(&s.shared.projected[t][i % kRankChunk], cta);
    if (token < s.p.m && rank < to.rank) {
      static_cast<__nv_bfloat16*>(to.low_rank)[token * to.rank + rank] = __float2bfloat16_rn(sum);
    }
  }
  cluster_sync();  // the others' sums may not change while somebody reads them
}

__global__ void __launch_bounds__(kQuantThreads) quantize_fp8_kernel(const __grid_constant__ QuantizeFp8 p) {
  extern __shared__ __align__(16) uint8_t memory[];
  __shared__ QuantShared shared;
  uint32_t clusters;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(clusters));
  const int rank = static_cast<int>(cluster_rank()), slice = static_cast<int>(p.k / clusters), pitch = slice * 2 + 16;
  const Slice s{p, shared, memory, slice, rank * slice, static_cast<int>(blockIdx.x / clusters) * kQuantTokens, pitch,
                static_cast<int>(clusters), rank, static_cast<int>(threadIdx.x / 32),
                static_cast<int>(threadIdx.x % 32)};
  auto* partial = reinterpret_cast<float*>(memory + kQuantTokens * pitch);
  load_rows(s);
  __syncthreads();
  if (p.scale) normalize_rows(s);
  for (int i = 0; i < p.targets; ++i) {
    const QuantizeTarget& to = p.target[i];
    write_codes(s, to, i % 2);
    for (int first = 0; first < to.rank; first += kRankChunk) project(s, to, first, partial);
  }
  cluster_sync();  // no CTA may go while another reads its sums
}

}  // namespace nibble::sm90a
