// Tokens for Hopper's W4A8 linear, in one read: [LayerNorm and modulation,] smoothing, e4m3 with one scale a token, and
// the projection onto the low-rank branch. One pass serves up to two linears that read the same tokens.
//
// The copy engine brings the rows of a CTA's tokens to shared memory. Then a thread owns columns, of all tokens, so
// that what belongs to a column (smooth factors, modulation) is read once. Where a row is too long, a cluster of CTAs
// shares it, a slice each. Sums over warps and CTAs are taken in their order, so a result has the same bits whatever
// runs beside it.
#pragma once
#include "../kernels.h"
#include "pairs.cuh"
#include "ptx.cuh"

namespace nibble::sm90a {

constexpr int kQuantTokens = 24, kQuantThreads = 384, kQuantWarps = kQuantThreads / 32;  // at most, of a CTA
constexpr int kTokenBlocks = kQuantTokens / 8;                                           // of a matrix product
constexpr int kRankChunk = 32;                                                           // ranks projected at a time
constexpr float kLargestE4m3 = 448;

struct QuantShared {
  uint64_t arrived;  // the barrier of the rows' copies
  float mean[kQuantTokens], inverse[kQuantTokens];
  float largest[2][kQuantTokens];  // of this slice, for each target: what the other CTAs of the cluster read
  float by[2][kQuantTokens];       // what makes codes of smoothed values
  union {
    float of_warp[2][kQuantWarps][kQuantTokens];  // largest values
    float projected[kQuantTokens][kRankChunk + 1];
  };
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

__device__ inline void multiply_16(float (&d)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int step = 16; step; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

__device__ inline const uint4* vector_at(const void* base, int64_t element) {
  return reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(base) + element);
}

__device__ inline uint32_t four_codes(const float* v, float by) {
  return pack_e4m3(v[0] * by, v[1] * by, v[2] * by, v[3] * by);
}

// Where a CTA stands: its tokens, its slice of the inputs, and its rows in shared memory.
struct Place {
  const QuantizeFp8& p;
  QuantShared& shared;
  uint8_t* rows;  // of `pitch` bytes
  int tokens, first_token, slice, first_input, pitch, clusters, rank, warp, warps, lane;

  __device__ uint4& at(int token, int input) const {
    return *reinterpret_cast<uint4*>(rows + token * pitch + input * 2);
  }
  __device__ void sync() const {
    if (clusters > 1) {
      cluster_sync();
    } else {
      __syncthreads();
    }
  }
};

__device__ inline void load_rows(const Place& s) {
  const uint32_t barrier = shared_address(&s.shared.arrived), bytes = s.slice * 2;
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    fence_barrier_init();
  }
  __syncthreads();
  if (s.warp == 0) {
    if (s.lane == 0) barrier_expect(barrier, s.tokens * bytes);
    __syncwarp();
    if (s.lane < s.tokens) {
      const int64_t from = int64_t{s.first_token + s.lane} * s.p.x_stride + s.first_input;
      copy_bulk(shared_address(&s.at(s.lane, 0)), vector_at(s.p.x, from), bytes, barrier);
    }
  }
  barrier_wait(barrier, 0);
}

// Mean and inverse deviation of every row; a warp takes whole rows, which no cluster shares here.
__device__ inline void row_statistics(const Place& s) {
  for (int t = s.warp; t < s.tokens; t += s.warps) {
    float mean = 0.0f, sum = 0.0f;
#pragma unroll
    for (int pass = 0; pass < 2; ++pass) {
      sum = 0.0f;
#pragma unroll 4
      for (int i = s.lane * 8; i < s.slice; i += 256) {
        float v[8];
        unpack_eight(s.at(t, i), v);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum = pass ? fmaf(v[j] - mean, v[j] - mean, sum) : sum + v[j];
      }
      sum = warp_sum(sum) / s.p.k;
      if (!pass) mean = sum;
    }
    if (s.lane == 0) s.shared.mean[t] = mean, s.shared.inverse[t] = rsqrtf(sum + s.p.eps);
  }
  __syncthreads();
}

// What a thread keeps of its eight columns while it goes through the tokens.
template <int kTargets>
struct Columns {
  float inv_smooth[kTargets][8];

  __device__ Columns(const QuantizeFp8& p, int column, bool real) {
#pragma unroll
    for (int target = 0; target < kTargets; ++target) {
      const float* inv = p.target[target].inv_smooth;
      float4 a{1, 1, 1, 1}, b = a;
      if (inv && real) {
        a = reinterpret_cast<const float4*>(inv + column)[0];
        b = reinterpret_cast<const float4*>(inv + column)[1];
      }
      float (&to)[8] = inv_smooth[target];
      to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w, to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
    }
  }

  __device__ void write(const QuantizeFp8& p, int target, int64_t place, const float (&v)[8], float by) const {
    float w[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) w[j] = v[j] * inv_smooth[target][j];
    *reinterpret_cast<uint2*>(p.target[target].codes + place) = {four_codes(w, by), four_codes(w + 4, by)};
  }
};

// LayerNorm(v) (1 + scale) + shift, rounded to 16 bits, for eight columns.
struct Modulation {
  float factor[8], shift[8];

  // Takes those of a token's sample, and tells with which token the next begins: tokens are many, so nothing is asked
  // of each of them.
  __device__ int take(const QuantizeFp8& p, int token, int column, bool real) {
    const int length = static_cast<int>(p.tokens_per_sample), sample = min(token / length, p.samples - 1);
    const int64_t from = int64_t{sample} * p.mod_stride + column;
    unpack_eight(real ? *vector_at(p.scale, from) : uint4{}, factor);
    unpack_eight(real ? *vector_at(p.shift, from) : uint4{}, shift);
#pragma unroll
    for (float& one : factor) one += 1.0f;
    return sample == p.samples - 1 ? static_cast<int>(p.m) : (sample + 1) * length;
  }

  __device__ uint4 apply(float mean, float inverse, float (&v)[8]) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = fmaf((v[j] - mean) * inverse, factor[j], shift[j]);
    const uint4 rounded = pack_eight(v);
    unpack_eight(rounded, v);
    return rounded;
  }
};

// The largest of |v / smooth| in the columns of a warp, for each target.
template <int kTargets>
__device__ inline void largest_of(const Columns<kTargets>& columns, const float (&v)[8], float (&largest)[kTargets]) {
#pragma unroll
  for (int target = 0; target < kTargets; ++target) {
    float mine = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; ++j) mine = fmaxf(mine, fabsf(v[j] * columns.inv_smooth[target][j]));
    // Floats that are not negative keep their order as integers.
    largest[target] = __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(mine)));
  }
}

// [Normalizes, and] leaves in of_warp the largest values of |v / smooth| in the columns of each warp.
template <int kTargets, bool kNorm>
__device__ inline void find_largest(const Place& s) {
  for (int base = s.warp * 256; base < s.slice; base += s.warps * 256) {
    const int i = base + s.lane * 8;
    const bool real = i < s.slice;
    const Columns<kTargets> columns(s.p, s.first_input + i, real);
    Modulation modulation;
    for (int t = 0; t < s.tokens;) {
      const int end =
          kNorm ? min(modulation.take(s.p, s.first_token + t, i, real) - s.first_token, s.tokens) : s.tokens;
#pragma unroll 2
      for (; t < end; ++t) {
        float v[8] = {}, largest[kTargets];
        if (real) {
          unpack_eight(s.at(t, i), v);
          if (kNorm) s.at(t, i) = modulation.apply(s.shared.mean[t], s.shared.inverse[t], v);
        }
        largest_of(columns, v, largest);
#pragma unroll
        for (int target = 0; target < kTargets; ++target) {
          float& kept = s.shared.of_warp[target][s.warp][t];
          if (s.lane == 0) kept = base < s.warps * 256 ? largest[target] : fmaxf(kept, largest[target]);
        }
      }
    }
  }
}

// The largest values of whole rows, and the scales that follow from them.
template <int kTargets>
__device__ inline void choose_scales(const Place& s) {
  __syncthreads();
  const int target = threadIdx.x / kQuantTokens, t = threadIdx.x % kQuantTokens;
  const bool mine = target < kTargets && t < s.tokens;
  float largest = 0.0f;
  if (mine) {
    // A warp past the end of a short row has noted nothing.
    for (int warp = 0; warp < s.warps && warp * 256 < s.slice; ++warp) {
      largest = fmaxf(largest, s.shared.of_warp[target][warp][t]);
    }
    s.shared.largest[target][t] = largest;
  }
  if (s.clusters > 1) {
    cluster_sync();
    for (int cta = 0; cta < s.clusters && mine; ++cta) {
      largest = fmaxf(largest, read_remote(&s.shared.largest[target][t], cta));
    }
  }
  if (mine) {
    const bool nothing = largest < kTinyMax;
    s.shared.by[target][t] = nothing ? 0.0f : kLargestE4m3 / largest;
    if (s.rank == 0) s.p.target[target].scales[s.first_token + t] = nothing ? 0.0f : largest * (1.0f / kLargestE4m3);
  }
  __syncthreads();
}

template <int kTargets>
__device__ inline void write_codes(const Place& s) {
  for (int i = threadIdx.x * 8; i < s.slice; i += s.warps * 256) {
    const Columns<kTargets> columns(s.p, s.first_input + i, true);
#pragma unroll 2
    for (int t = 0; t < s.tokens; ++t) {
      float v[8];
      unpack_eight(s.at(t, i), v);
      const int64_t to = int64_t{s.first_token + t} * s.p.k + s.first_input + i;
#pragma unroll
      for (int target = 0; target < kTargets; ++target) {
        columns.write(s.p, target, to, v, s.shared.by[target][t]);
      }
    }
  }
}

// Sums of a chunk of 32 ranks, as the matrix units leave them in a warp: ranks down, tokens across.
using Sums = float[kRankChunk / 16][kTokenBlocks][4];

// Warps take runs of 32 inputs in turns. The 32 inputs of a run are dealt to the matrix units eight a lane: any order
// serves, if both operands keep to it.
__device__ inline void multiply_down(const Place& s, const QuantizeTarget& to, int first_rank, Sums& d) {
  const int row = s.lane / 4, run = s.lane % 4 * 8;
  const auto* from = static_cast<const uint4*>(to.down) + s.lane;
  const int tiles = static_cast<int>(to.rank / 8), first_tile = first_rank / 8;
#pragma unroll 2
  for (int i = s.warp * 32; i < s.slice; i += s.warps * 32) {
    const auto* tile = from + (int64_t{s.first_input + i} / 32 * tiles + first_tile) * 32;
    uint4 down[kRankChunk / 8];
#pragma unroll
    for (int j = 0; j < kRankChunk / 8; ++j) down[j] = first_tile + j < tiles ? tile[j * 32] : uint4{};
#pragma unroll
    for (int block = 0; block < kTokenBlocks; ++block) {
      if (block * 8 >= s.tokens) break;
      const uint4 v = s.at(min(block * 8 + row, s.tokens - 1), i + run);
#pragma unroll
      for (int m = 0; m < kRankChunk / 16; ++m) {
        multiply_16(d[m][block], down[2 * m], v.x, v.y);
        multiply_16(d[m][block], down[2 * m + 1], v.z, v.w);
      }
    }
  }
}

// A lane's two sums of a part (tokens `token` and the next, of rank `rank`) are d[m][block][half * 2] and the one
// after.
constexpr int kParts = kRankChunk / 16 * kTokenBlocks * 2;

struct Part {
  int m, block, half, token, rank;

  __device__ Part(const Place& s, int part)
      : m(part / (2 * kTokenBlocks)),
        block(part / 2 % kTokenBlocks),
        half(part % 2),
        token(block * 8 + s.lane % 4 * 2),
        rank(m * 16 + s.lane / 4 + half * 8) {}
};

// The warps' sums, added into `projected`. In each round every warp adds another part, so that none waits for another;
// which warp comes when depends on nothing but the part.
__device__ inline void add_warps(const Place& s, const Sums& d) {
  static_assert(kParts >= kQuantWarps, "two warps would add to the same sums");
  auto& projected = s.shared.projected;
  __syncthreads();
  for (int i = threadIdx.x; i < s.tokens * kRankChunk; i += s.warps * 32) {
    projected[i / kRankChunk][i % kRankChunk] = 0.0f;
  }
  for (int round = 0; round < kParts; ++round) {
    __syncthreads();
    const int mine = (s.warp + round) % kParts;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const Part part(s, i);
      if (i == mine && part.token < s.tokens) {
        projected[part.token][part.rank] += d[part.m][part.block][part.half * 2];
        if (part.token + 1 < s.tokens) {
          projected[part.token + 1][part.rank] += d[part.m][part.block][part.half * 2 + 1];
        }
      }
    }
  }
}

// The same for a CTA's last sums, which may take the place of the rows: all warps at once.
__device__ inline void add_warps_in_rows(const Place& s, const Sums& d) {
  const int room = s.tokens * kRankChunk;
  auto* sums = reinterpret_cast<float*>(s.rows);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    const Part part(s, i);
    float* to = sums + s.warp * room + part.token * kRankChunk + part.rank;
    if (part.token < s.tokens) to[0] = d[part.m][part.block][part.half * 2];
    if (part.token + 1 < s.tokens) to[kRankChunk] = d[part.m][part.block][part.half * 2 + 1];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < room; i += s.warps * 32) {
    float sum = 0.0f;
#pragma unroll 4
    for (int warp = 0; warp < s.warps; ++warp) sum += sums[warp * room + i];
    s.shared.projected[i / kRankChunk][i % kRankChunk] = sum;
  }
}

__device__ inline void project(const Place& s, const QuantizeTarget& to, int first_rank, bool last) {
  Sums d = {};
  multiply_down(s, to, first_rank, d);
  if (last && s.warps * kRankChunk * 4 <= s.pitch) {
    add_warps_in_rows(s, d);
  } else {
    add_warps(s, d);
  }
  s.sync();
  // Each CTA finishes some of the tokens.
  for (int i = threadIdx.x; i < s.tokens * kRankChunk; i += s.warps * 32) {
    const int t = i / kRankChunk, rank = first_rank + i % kRankChunk;
    if (t % s.clusters != s.rank || rank >= to.rank) continue;
    const float* mine = &s.shared.projected[t][i % kRankChunk];
    float sum = s.clusters > 1 ? 0.0f : *mine;
    for (int cta = 0; cta < s.clusters && s.clusters > 1; ++cta) sum += read_remote(mine, cta);
    static_cast<__nv_bfloat16*>(to.low_rank)[int64_t{s.first_token + t} * to.rank + rank] = __float2bfloat16_rn(sum);
  }
  s.sync();  // the others' sums may not change while somebody reads them
}

// `tokens` of a CTA, rows of `pitch` bytes.
template <int kTargets, bool kNorm>
__global__ void __launch_bounds__(kQuantThreads, 2)
    quantize_fp8_kernel(const __grid_constant__ QuantizeFp8 p, int tokens, int pitch) {
  extern __shared__ __align__(128) uint8_t memory[];
  __shared__ QuantShared shared;
  uint32_t clusters;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(clusters));
  const int rank = static_cast<int>(cluster_rank()), slice = static_cast<int>(p.k / clusters);
  const int first = static_cast<int>(blockIdx.x / clusters) * tokens;
  const Place s{p,
                shared,
                memory,
                min(tokens, static_cast<int>(p.m) - first),
                first,
                slice,
                rank * slice,
                pitch,
                static_cast<int>(clusters),
                rank,
                warp_in_block(),
                static_cast<int>(blockDim.x / 32),
                static_cast<int>(threadIdx.x % 32)};
  load_rows(s);
  if (kNorm) row_statistics(s);
  find_largest<kTargets, kNorm>(s);
  choose_scales<kTargets>(s);
  write_codes<kTargets>(s);
  // choose_scales is done with of_warp everywhere before the sums that share its place begin.
  for (int i = 0; i < kTargets; ++i) {
    const int64_t ranks = p.target[i].rank;
    for (int chunk = 0; chunk < ranks; chunk += kRankChunk) {
      project(s, p.target[i], chunk, i == kTargets - 1 && chunk + kRankChunk >= ranks);
    }
  }
  s.sync();  // no CTA may go while another reads its sums
}

}  // namespace nibble::sm90a
