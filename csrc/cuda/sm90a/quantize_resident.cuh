// The pass of quantize.cuh for many tokens of one linear without a norm: CTAs stay, and so does their slice of `down`
// in shared memory. They take one group of tokens after the other, the next groups' rows on their way meanwhile.
//
// A cluster shares a row, a slice each, and meets once a group: a CTA then reads the others' largest values of this
// group, and their sums of the projection of the group before. The group's own projection runs while they meet. A
// thread owns eight columns of a quarter of the tokens. Codes and scales have the bits of quantize.cuh's, and a sum the
// same bits in whichever group its token is.
#pragma once
#include "quantize.cuh"

namespace nibble::sm90a {

constexpr int kResidentTokens = 16, kResidentThreads = 768, kResidentRanks = 32, kResidentSlice = 1536;  // at most
constexpr int kColumnWarps = kResidentSlice / 256, kQuarters = kResidentThreads / 32 / kColumnWarps;
constexpr int kTokensEach = kResidentTokens / kQuarters;
constexpr int kInputWarps = kResidentThreads / 32 / 2;  // that share the inputs of 16 ranks
constexpr int kSumPitch = kResidentRanks + 4;           // floats: eight ranks of four tokens then meet in no bank
constexpr int kResidentPitch = kResidentSlice * 2 + 64;
constexpr int kRowsBytes = kResidentTokens * kResidentPitch;
constexpr int kDownBytes = kResidentSlice * kResidentRanks * 2;
constexpr int kResidentBytes = kDownBytes + 2 * kRowsBytes + kInputWarps * kResidentTokens * kSumPitch * 4;

struct ResidentShared {
  uint64_t arrived[2], down_arrived;
  float of_warp[kColumnWarps][kResidentTokens];  // largest values
  float by[kResidentTokens];                     // what makes codes of smoothed values
  // What the other CTAs read, of this group and the one before: they may read while the next is written.
  float largest[2][kResidentTokens];
  float projected[2][kResidentTokens][kResidentRanks + 1];
};

__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

struct Resident {
  const QuantizeFp8& p;
  ResidentShared& shared;
  uint8_t* memory;  // down, two buffers of rows, sums
  int group_tokens, groups, slice, first_input, clusters, rank, warp, lane;

  __device__ int tokens(int group) const { return min(group_tokens, static_cast<int>(p.m) - group * group_tokens); }
  __device__ uint8_t* rows(int buffer) const { return memory + kDownBytes + buffer * kRowsBytes; }
  __device__ const uint4& at(int buffer, int token, int input) const {
    return *reinterpret_cast<const uint4*>(rows(buffer) + token * kResidentPitch + input * 2);
  }
  __device__ float* sums(int warp) const {
    return reinterpret_cast<float*>(memory + kDownBytes + 2 * kRowsBytes) + warp * kResidentTokens * kSumPitch;
  }
};

// By warp 0: the rows of a group, if there is one.
__device__ inline void load_group(const Resident& s, int group, int buffer) {
  if (s.warp != 0 || group >= s.groups) return;
  const uint32_t barrier = shared_address(&s.shared.arrived[buffer]), bytes = s.slice * 2;
  const int tokens = s.tokens(group);
  if (s.lane == 0) barrier_expect(barrier, tokens * bytes);
  __syncwarp();
  if (s.lane < tokens) {
    const int64_t from = (int64_t{group} * s.group_tokens + s.lane) * s.p.x_stride + s.first_input;
    copy_bulk(shared_address(&s.at(buffer, s.lane, 0)), vector_at(s.p.x, from), bytes, barrier);
  }
}

__device__ inline void load_down(const Resident& s) {
  const QuantizeTarget& to = s.p.target[0];
  if (threadIdx.x != 0 || !to.rank) return;
  const uint32_t barrier = shared_address(&s.shared.down_arrived), bytes = s.slice * static_cast<int>(to.rank) * 2;
  barrier_expect(barrier, bytes);
  copy_bulk(shared_address(s.memory), vector_at(to.down, s.first_input * to.rank), bytes, barrier);
}

// A thread's columns, and the first of its tokens.
struct Share {
  int column, first_token;
  bool real;
  float inv_smooth[8];

  __device__ explicit Share(const Resident& s) {
    column = (s.warp % kColumnWarps * 32 + s.lane) * 8;
    first_token = s.warp / kColumnWarps * kTokensEach;
    real = column < s.slice;
    const float* inv = s.p.target[0].inv_smooth;
    for (int j = 0; j < 8; ++j) inv_smooth[j] = inv && real ? inv[s.first_input + column + j] : 1.0f;
  }
};

__device__ inline void largest_of_group(const Resident& s, const Share& mine, int buffer, int tokens) {
#pragma unroll
  for (int i = 0; i < kTokensEach; ++i) {
    const int t = mine.first_token + i;
    if (t >= tokens) break;
    float v[8] = {}, largest = 0.0f;
    if (mine.real) unpack_eight(s.at(buffer, t, mine.column), v);
#pragma unroll
    for (int j = 0; j < 8; ++j) largest = fmaxf(largest, fabsf(v[j] * mine.inv_smooth[j]));
    // Floats that are not negative keep their order as integers.
    largest = __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(largest)));
    if (s.lane == 0) s.shared.of_warp[s.warp % kColumnWarps][t] = largest;
  }
  __syncthreads();
}

// A warp's sums: 16 ranks (its half of them) of both blocks of eight tokens, over every twelfth run of 32 inputs.
__device__ inline void project_group(const Resident& s, int buffer) {
  const int half = s.warp / kInputWarps, tiles = static_cast<int>(s.p.target[0].rank / 8);
  if (half * 2 >= tiles) return;
  const auto* down = reinterpret_cast<const uint4*>(s.memory) + half * 64 + s.lane;
  float d[2][4] = {};
#pragma unroll 2
  for (int i = s.warp % kInputWarps * 32; i < s.slice; i += kInputWarps * 32) {
    const uint4 a = down[i * tiles], b = down[i * tiles + 32];
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const uint4 v = s.at(buffer, block * 8 + s.lane / 4, i + s.lane % 4 * 8);
      multiply_16(d[block], a.x, b.x, a.y, b.y, v.x, v.y);
      multiply_16(d[block], a.z, b.z, a.w, b.w, v.z, v.w);
    }
  }
  float* to = s.sums(s.warp % kInputWarps) + s.lane % 4 * 2 * kSumPitch + half * 16 + s.lane / 4;
#pragma unroll
  for (int block = 0; block < 2; ++block, to += 8 * kSumPitch) {
    to[0] = d[block][0], to[kSumPitch] = d[block][1];
    to[8] = d[block][2], to[kSumPitch + 8] = d[block][3];
  }
}

// The scales of a group, once its largest values lie in every CTA: eight lanes a token, a CTA each.
__device__ inline void choose_group_scales(const Resident& s, int group, int parity) {
  const int t = threadIdx.x / 8, cta = threadIdx.x % 8;
  if (t >= kResidentTokens) return;  // whole warps
  float largest = cta < s.clusters ? read_remote(&s.shared.largest[parity][t], cta) : 0.0f;
#pragma unroll
  for (int step = 4; step; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  if (cta != 0 || t >= s.tokens(group)) return;
  const bool nothing = largest < kTinyMax;
  s.shared.by[t] = nothing ? 0.0f : kLargestE4m3 / largest;
  if (s.rank == 0) {
    s.p.target[0].scales[group * s.group_tokens + t] = nothing ? 0.0f : largest * (1.0f / kLargestE4m3);
  }
}

// The projections of a group, once every CTA's sums lie there: each CTA finishes some of the tokens. Not by the warps
// that choose scales.
__device__ inline void finish_group(const Resident& s, int group, int parity) {
  constexpr int kOthers = kResidentTokens * 8;
  const QuantizeTarget& to = s.p.target[0];
  const int tokens = s.tokens(group), first = static_cast<int>(threadIdx.x) - kOthers;
  if (first < 0 || !to.rank) return;
  for (int i = first; i < tokens * kResidentRanks; i += kResidentThreads - kOthers) {
    const int t = i / kResidentRanks, rank = i % kResidentRanks;
    if (t % s.clusters != s.rank || rank >= to.rank) continue;
    float part[8], sum = 0.0f;
#pragma unroll
    for (int cta = 0; cta < 8; ++cta) {
      part[cta] = cta < s.clusters ? read_remote(&s.shared.projected[parity][t][rank], cta) : 0.0f;
    }
#pragma unroll
    for (int cta = 0; cta < 8; ++cta) sum += part[cta];
    const int64_t token = int64_t{group} * s.group_tokens + t;
    static_cast<__nv_bfloat16*>(to.low_rank)[token * to.rank + rank] = __float2bfloat16_rn(sum);
  }
}

__device__ inline void write_group(const Resident& s, const Share& mine, int group, int buffer) {
  const int tokens = s.tokens(group);
  uint8_t* to = s.p.target[0].codes + int64_t{group} * s.group_tokens * s.p.k + s.first_input + mine.column;
#pragma unroll
  for (int i = 0; i < kTokensEach; ++i) {
    const int t = mine.first_token + i;
    if (t >= tokens || !mine.real) break;
    float v[8];
    unpack_eight(s.at(buffer, t, mine.column), v);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] *= mine.inv_smooth[j];
    const float by = s.shared.by[t];
    *reinterpret_cast<uint2*>(to + t * s.p.k) = {four_codes(v, by), four_codes(v + 4, by)};
  }
}

// The warps' sums, added in their order, for the cluster to read.
__device__ inline void add_group(const Resident& s, int tokens, int parity) {
  for (int i = threadIdx.x; i < tokens * kResidentRanks; i += kResidentThreads) {
    const int t = i / kResidentRanks, rank = i % kResidentRanks;
    if (rank >= s.p.target[0].rank) continue;
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kInputWarps; ++warp) sum += s.sums(warp)[t * kSumPitch + rank];
    s.shared.projected[parity][t][rank] = sum;
  }
}

__global__ void __launch_bounds__(kResidentThreads, 1)
    quantize_resident_kernel(const __grid_constant__ QuantizeFp8 p, int group_tokens) {
  extern __shared__ __align__(128) uint8_t memory[];
  __shared__ ResidentShared shared;
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
  const int clusters = static_cast<int>(size), rank = static_cast<int>(cluster_rank());
  const int slice = static_cast<int>(p.k) / clusters,
            groups = (static_cast<int>(p.m) + group_tokens - 1) / group_tokens;
  const Resident s{p,
                   shared,
                   memory,
                   group_tokens,
                   groups,
                   slice,
                   rank * slice,
                   clusters,
                   rank,
                   warp_in_block(),
                   static_cast<int>(threadIdx.x % 32)};
  const int first = static_cast<int>(blockIdx.x) / clusters, stride = static_cast<int>(gridDim.x) / clusters;
  if (threadIdx.x == 0) {
    for (uint64_t* barrier : {shared.arrived, shared.arrived + 1, &shared.down_arrived}) {
      barrier_init(shared_address(barrier), 1);
    }
    fence_barrier_init();
  }
  __syncthreads();
  load_group(s, first, 0);
  load_down(s);
  load_group(s, first + stride, 1);
  const Share mine(s);
  int round = 0;
  for (int group = first; group < groups; group += stride, ++round) {
    const int buffer = round % 2, tokens = s.tokens(group);
    barrier_wait(shared_address(&shared.arrived[buffer]), round / 2 % 2);
    largest_of_group(s, mine, buffer, tokens);
    if (threadIdx.x < kResidentTokens) {
      float largest = 0.0f;
      for (int warp = 0; warp < kColumnWarps; ++warp) largest = fmaxf(largest, shared.of_warp[warp][threadIdx.x]);
      shared.largest[buffer][threadIdx.x] = largest;
    }
    __syncwarp();
    cluster_arrive();
    if (round == 0 && p.target[0].rank) barrier_wait(shared_address(&shared.down_arrived), 0);
    project_group(s, buffer);
    cluster_wait();
    choose_group_scales(s, group, buffer);
    if (round) finish_group(s, group - stride, buffer ^ 1);
    __syncthreads();
    write_group(s, mine, group, buffer);
    add_group(s, tokens, buffer);
    __syncthreads();  // the rows were read
    load_group(s, group + 2 * stride, buffer);
  }
  cluster_sync();
  finish_group(s, first + (round - 1) * stride, (round - 1) % 2);
  cluster_sync();  // no CTA may go while another reads its sums
}

}  // namespace nibble::sm90a
