// Tokens for Hopper's W4A8 linear, in one read: [x + gate y,] [LayerNorm and modulation,] smoothing, e4m3 with one
// scale a token, and the projection onto the low-rank branch. One pass serves up to two linears that read the same
// tokens.
//
// A CTA takes 16 tokens and keeps their inputs in shared memory; where a row is too long, a cluster of CTAs shares it,
// a slice each. What needs a whole row (mean, variance, largest value, projection) is then summed slice by slice in the
// order of the cluster's ranks, so a result has the same bits whatever runs beside it.
#pragma once
#include "../kernels.h"
#include "ptx.cuh"

namespace nibble::sm90a {

constexpr int kQuantTokens = 16, kQuantThreads = 256, kQuantWarps = kQuantThreads / 32;
constexpr int kRowsAtOnce = kQuantTokens / kQuantWarps;  // of a warp: 2
constexpr int kRankChunk = 32;                           // ranks projected at a time
constexpr int kPartials = 4;                             // projections of so many warps are kept apart
constexpr float kLargestE4m3 = 448;

struct QuantShared {
  float sums[2][kQuantTokens];     // of a slice: what the other CTAs of the cluster read
  float largest[2][kQuantTokens];  // of a slice, for each target
  float whole[kQuantTokens];       // of the row
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
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
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
  __device__ int row(int r) const { return warp + r * kQuantWarps; }
  __device__ bool real(int t) const { return first_token + t < p.m; }
  __device__ int64_t sample(int t) const {
    return min(static_cast<int>((first_token + t) / p.tokens_per_sample), p.samples - 1);
  }
  __device__ void sync() const {
    if (clusters > 1) {
      cluster_sync();
    } else {
      __syncthreads();
    }
  }
};

// Sums (or largest values) of every row over the cluster, from `parts` of each CTA into `whole`.
template <bool kLargest>
__device__ void over_cluster(const Slice& s, const float (&parts)[kQuantTokens]) {
  s.sync();
  if (threadIdx.x < kQuantTokens) {
    float all = 0.0f;
    for (int cta = 0; cta < s.clusters; ++cta) {
      const float part = s.clusters > 1 ? read_remote(&parts[threadIdx.x], cta) : parts[threadIdx.x];
      all = kLargest ? fmaxf(all, part) : all + part;
    }
    s.shared.whole[threadIdx.x] = all;
  }
  __syncthreads();
}

__device__ inline const uint4* vector_at(const void* base, int64_t element) {
  return reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(base) + element);
}

// The largest values of |v / smooth| so far, for every target.
__device__ inline void note_largest(const Slice& s, int i, const float (&v)[kRowsAtOnce][8],
                                    float (&largest)[2][kRowsAtOnce]) {
#pragma unroll
  for (int target = 0; target < 2; ++target) {
    if (target >= s.p.targets) break;
    float by[8] = {1, 1, 1, 1, 1, 1, 1, 1};
    if (const float* inv = s.p.target[target].inv_smooth) {
      const auto* from = reinterpret_cast<const float4*>(inv + s.first_input + i);
      const float4 a = from[0], b = from[1];
      by[0] = a.x, by[1] = a.y, by[2] = a.z, by[3] = a.w, by[4] = b.x, by[5] = b.y, by[6] = b.z, by[7] = b.w;
    }
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
#pragma unroll
      for (int j = 0; j < 8; ++j) largest[target][r] = fmaxf(largest[target][r], fabsf(v[r][j] * by[j]));
    }
  }
}

__device__ inline void keep_largest(const Slice& s, const float (&largest)[2][kRowsAtOnce]) {
#pragma unroll
  for (int target = 0; target < 2; ++target) {
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const float all = warp_max(largest[target][r]);
      if (s.lane == 0) s.shared.largest[target][s.row(r)] = all;
    }
  }
}

// v = x + gate (y + y2), rounded to 16 bits and written.
__device__ inline void add_branch(const Slice& s, int t, int i, float (&v)[8]) {
  const QuantizeFp8& p = s.p;
  const int64_t at = int64_t{s.first_token + t} * p.k + s.first_input + i;
  float added[8], gate[8];
  unpack_eight(*vector_at(p.y, at), added);
  unpack_eight(*vector_at(p.gate, s.sample(t) * p.mod_stride + s.first_input + i), gate);
  if (p.y2) {
    float more[8];
    unpack_eight(*vector_at(p.y2, at), more);
#pragma unroll
    for (int j = 0; j < 8; ++j) added[j] += more[j];
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) v[j] = __bfloat162float(__float2bfloat16_rn(fmaf(gate[j], added[j], v[j])));
  *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(p.x_out) + at) = pack_eight(v);
}

// Load the slice. Leaves row sums in sums[0] where they will be normalized, else the largest values.
__device__ inline void load_rows(const Slice& s) {
  const QuantizeFp8& p = s.p;
  float sum[kRowsAtOnce] = {}, largest[2][kRowsAtOnce] = {};
#pragma unroll 2
  for (int i = s.lane * 8; i < s.slice; i += 256) {
    float v[kRowsAtOnce][8] = {};
    uint4 raw[kRowsAtOnce] = {};
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const int t = s.row(r);
      if (s.real(t)) raw[r] = *vector_at(p.x, int64_t{s.first_token + t} * p.x_stride + s.first_input + i);
    }
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const int t = s.row(r);
      unpack_eight(raw[r], v[r]);
      if (p.y && s.real(t)) add_branch(s, t, i, v[r]);
      s.at(t, i) = p.y ? pack_eight(v[r]) : raw[r];
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[r] += v[r][j];
    }
    if (!p.scale) note_largest(s, i, v, largest);
  }
  if (!p.scale) keep_largest(s, largest);
#pragma unroll
  for (int r = 0; r < kRowsAtOnce; ++r) {
    sum[r] = warp_sum(sum[r]);
    if (s.lane == 0) s.shared.sums[0][s.row(r)] = sum[r];
  }
}

// LayerNorm without parameters, then h (1 + scale) + shift, in place.
__device__ inline void normalize_rows(const Slice& s) {
  const QuantizeFp8& p = s.p;
  over_cluster<false>(s, s.shared.sums[0]);
  float mean[kRowsAtOnce], squares[kRowsAtOnce] = {}, inverse[kRowsAtOnce], largest[2][kRowsAtOnce] = {};
#pragma unroll
  for (int r = 0; r < kRowsAtOnce; ++r) mean[r] = s.shared.whole[s.row(r)] / p.k;
#pragma unroll 3
  for (int i = s.lane * 8; i < s.slice; i += 256) {
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      float v[8];
      unpack_eight(s.at(s.row(r), i), v);
#pragma unroll
      for (int j = 0; j < 8; ++j) squares[r] += (v[j] - mean[r]) * (v[j] - mean[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < kRowsAtOnce; ++r) {
    squares[r] = warp_sum(squares[r]);
    if (s.lane == 0) s.shared.sums[1][s.row(r)] = squares[r];
  }
  over_cluster<false>(s, s.shared.sums[1]);
#pragma unroll
  for (int r = 0; r < kRowsAtOnce; ++r) inverse[r] = rsqrtf(s.shared.whole[s.row(r)] / p.k + p.eps);
#pragma unroll 2
  for (int i = s.lane * 8; i < s.slice; i += 256) {
    float v[kRowsAtOnce][8];
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const int t = s.row(r);
      const int64_t from = s.sample(t) * p.mod_stride + s.first_input + i;
      float scale[8], shift[8];
      unpack_eight(*vector_at(p.scale, from), scale);
      unpack_eight(*vector_at(p.shift, from), shift);
      unpack_eight(s.at(t, i), v[r]);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[r][j] = fmaf((v[r][j] - mean[r]) * inverse[r], 1.0f + scale[j], shift[j]);
      const uint4 rounded = pack_eight(v[r]);
      s.at(t, i) = rounded;
      unpack_eight(rounded, v[r]);
    }
    note_largest(s, i, v, largest);
  }
  keep_largest(s, largest);
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

__device__ inline void write_codes(const Slice& s, const QuantizeTarget& to, int target) {
  over_cluster<true>(s, s.shared.largest[target]);
  float by[kRowsAtOnce];
#pragma unroll
  for (int r = 0; r < kRowsAtOnce; ++r) {
    const float largest = s.shared.whole[s.row(r)];
    by[r] = largest < kTinyMax ? 0.0f : kLargestE4m3 / largest;
    if (s.rank == 0 && s.lane == 0 && s.real(s.row(r))) {
      to.scales[s.first_token + s.row(r)] = largest < kTinyMax ? 0.0f : largest * (1.0f / kLargestE4m3);
    }
  }
#pragma unroll 3
  for (int i = s.lane * 8; i < s.slice; i += 256) {
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      float v[8];
      smoothed(s, to.inv_smooth, s.row(r), i, v);
      if (!s.real(s.row(r))) continue;
      *reinterpret_cast<uint2*>(to.codes + int64_t{s.first_token + s.row(r)} * s.p.k + s.first_input + i) = {
          four_codes(v, by[r]), four_codes(v + 4, by[r])};
    }
  }
}

// Projections of the slice onto 32 ranks: warps take runs of 32 inputs in turns, their sums meet in shared memory.
// The 32 inputs of a run are dealt to the matrix units eight a lane: any order serves, if both operands keep to it.
__device__ inline void project(const Slice& s, const QuantizeTarget& to, int first_rank, float* partial) {
  constexpr int kBlocks = kRankChunk / 8;
  float d[kBlocks][4] = {};
  const int row = s.lane / 4, run = s.lane % 4 * 8;
#pragma unroll 3
  for (int i = s.warp * 32; i < s.slice; i += kQuantWarps * 32) {
    uint4 down[kBlocks];
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      const int rank = first_rank + j * 8 + row;
      down[j] = rank < to.rank ? *vector_at(to.down, int64_t{rank} * s.p.k + s.first_input + i + run) : uint4{};
    }
    const uint4 a = s.at(row, i + run), b = s.at(row + 8, i + run);
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      multiply_16(d[j], a.x, b.x, a.y, b.y, down[j].x, down[j].y);
      multiply_16(d[j], a.z, b.z, a.w, b.w, down[j].z, down[j].w);
    }
  }
  for (int round = 0; round < kQuantWarps / kPartials; ++round) {
    if (s.warp / kPartials == round) {
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = row + i / 2 * 8, rank = j * 8 + s.lane % 4 * 2 + i % 2;
          float& sum = partial[(s.warp % kPartials * kQuantTokens + token) * kRankChunk + rank];
          sum = round ? sum + d[j][i] : d[j][i];
        }
      }
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < kQuantTokens * kRankChunk; i += kQuantThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int part = 0; part < kPartials; ++part) sum += partial[part * kQuantTokens * kRankChunk + i];
    s.shared.projected[i / kRankChunk][i % kRankChunk] = sum;
  }
  s.sync();
  // Each CTA finishes some of the tokens.
  const int share = kQuantTokens / s.clusters;
  for (int i = threadIdx.x; i < share * kRankChunk; i += kQuantThreads) {
    const int t = s.rank * share + i / kRankChunk, rank = first_rank + i % kRankChunk;
    const float* mine = &s.shared.projected[t][i % kRankChunk];
    float sum = s.clusters > 1 ? 0.0f : *mine;
    for (int cta = 0; cta < s.clusters && s.clusters > 1; ++cta) sum += read_remote(mine, cta);
    if (s.real(t) && rank < to.rank) {
      static_cast<__nv_bfloat16*>(to.low_rank)[int64_t{s.first_token + t} * to.rank + rank] = __float2bfloat16_rn(sum);
    }
  }
  s.sync();  // the others' sums may not change while somebody reads them
}

__global__ void __launch_bounds__(kQuantThreads, 2) quantize_fp8_kernel(const __grid_constant__ QuantizeFp8 p) {
  extern __shared__ __align__(16) uint8_t memory[];
  __shared__ QuantShared shared;
  uint32_t clusters;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(clusters));
  const int rank = static_cast<int>(cluster_rank()), slice = static_cast<int>(p.k / clusters), pitch = slice * 2 + 16;
  const Slice s{p,
                shared,
                memory,
                slice,
                rank * slice,
                static_cast<int>(blockIdx.x / clusters) * kQuantTokens,
                pitch,
                static_cast<int>(clusters),
                rank,
                static_cast<int>(threadIdx.x / 32),
                static_cast<int>(threadIdx.x % 32)};
  auto* partial = reinterpret_cast<float*>(memory + kQuantTokens * pitch);
  load_rows(s);
  if (p.scale) normalize_rows(s);
  for (int i = 0; i < p.targets; ++i) {
    const QuantizeTarget& to = p.target[i];
    write_codes(s, to, i);
    for (int first = 0; first < to.rank; first += kRankChunk) project(s, to, first, partial);
  }
  s.sync();  // no CTA may go while another reads its sums
}

}  // namespace nibble::sm90a
