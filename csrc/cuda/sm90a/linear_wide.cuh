// The W4A8 linear of Hopper for many tokens: weights were widened to e4m3 (widen.cuh), both operands lie in shared
// memory.
//
// The sums stay in the matrix units' accumulators over all of K and the low-rank branch, whose up-projection was
// divided by the rows' scales (divide.cuh). It comes last, since a product of 8-bit numbers keeps 13 bits below the
// largest term, one of 16-bit numbers all of float32's; and between the two sums get their tokens' scales.
//
// The two multiplying warpgroups need no turns: while one writes its outputs, the other has the matrix units to itself,
// as far ahead as the ring of stages lets it run.
#pragma once
#include "wgmma.cuh"
#include "widen.cuh"

namespace nibble::sm90a {

template <int kTokens>
struct WideShape {
  static constexpr int kStages = kTokens > 192 ? 4 : kTokens == 192 ? 5 : 6;
  static constexpr int kTokenBytes = kTokens * 128;
  static constexpr int kOut = kTokens % 128 ? kTokens / 2 : 128;  // tokens that are written at once
  static constexpr int kOutBytes = kOut * kRows * 2;
  static constexpr int kShared = kStages * (kTokenBytes + 2 * kWideBytes) + 2 * kOutBytes + 2 * kStages * 8 + 1024;
};

template <int kTokens>
struct WideStage {
  using S = WideShape<kTokens>;
  uint32_t tokens, weights, out, full, empty;

  __device__ explicit WideStage(uint32_t base) {
    tokens = (base + 1023) & ~1023u;
    weights = tokens + S::kStages * S::kTokenBytes;
    out = weights + S::kStages * 2 * kWideBytes;
    full = out + 2 * S::kOutBytes;
    empty = full + S::kStages * 8;
  }
};

// One stage: half of its tokens for both CTAs, and this CTA's two panels. Weights and up-projection are blocks of 64
// rows.
template <int kTokens>
__device__ inline void fetch_stage(WideStage<kTokens> at, int stage, uint32_t phase, const CUtensorMap* map, int column,
                                   int row, const uint8_t* first, const uint8_t* second, uint32_t rank_in_cluster) {
  using S = WideShape<kTokens>;
  const uint32_t full = at.full + stage * 8, weights = at.weights + stage * 2 * kWideBytes;
  barrier_wait(at.empty + stage * 8, phase ^ 1);
  barrier_expect(full, S::kTokenBytes + 2 * kWideBytes);
  copy_box_to_all(at.tokens + stage * S::kTokenBytes + rank_in_cluster * (kTokens / 2) * 128, map, column, row, full,
                  3);
  copy_bulk(weights, first, kWideBytes, full);
  copy_bulk(weights + kWideBytes, second, kWideBytes, full);
}

template <int kTokens>
__device__ void fetch_wide(const CUtensorMap& act, const CUtensorMap& low_rank, const Args& p, WideStage<kTokens> at,
                           int cluster, int clusters, uint32_t rank_in_cluster) {
  Turn<WideShape<kTokens>::kStages> turn;
  const int chunks = (p.rank + kRanks - 1) / kRanks;
  for (int tile = cluster; tile < p.tiles; tile += clusters) {
    const int row = tile % p.token_tiles * kTokens + rank_in_cluster * (kTokens / 2);
    const int panel = (tile / p.token_tiles * 2 + static_cast<int>(rank_in_cluster)) * 2;
    // A panel past the end (of an odd pair) is fetched from the start: it is multiplied, but never stored.
    const int64_t first = panel < p.panels ? panel : 0, second = panel + 1 < p.panels ? panel + 1 : 0;
    const auto run = [&](const CUtensorMap& map, int width, const uint8_t* from, int blocks) {
      const uint8_t *one = from + first * blocks * kWideBytes, *two = from + second * blocks * kWideBytes;
      for (int i = 0; i < blocks; ++i, turn.next(), one += kWideBytes, two += kWideBytes) {
        fetch_stage<kTokens>(at, turn.stage, turn.phase, &map, i * width, row, one, two, rank_in_cluster);
      }
    };
    run(act, kInputs, p.wide, p.steps);
    run(low_rank, kRanks, p.wide_up, chunks);
  }
}

// What a thread needs of its two rows once the product is done, fetched before it begins.
struct Rows {
  float low, high, bias_low, bias_high;

  __device__ Rows(const Args& p, int n)
      : low(row_divisor(p.row_most, n)),
        high(row_divisor(p.row_most, n + 8)),
        bias_low(p.bias[n]),
        bias_high(p.bias[n + 8]) {}
};

// Scales of the tokens in this thread's columns. A whole tile's lie at constant distances: loads and nothing else.
template <int kTokens>
__device__ void load_token_scales(const Args& p, int token, float (&scale)[kTokens / 4]) {
  const int first = token + threadIdx.x % 4 * 2;
  const float* from = p.act_scale + first;
  if (token + kTokens <= p.m && reinterpret_cast<uintptr_t>(p.act_scale) % 8 == 0) {
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      const float2 two = *reinterpret_cast<const float2*>(from + j * 8);
      scale[2 * j] = two.x, scale[2 * j + 1] = two.y;
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
    scale[2 * j] = first + j * 8 < p.m ? from[j * 8] : 0.0f;
    scale[2 * j + 1] = first + j * 8 + 1 < p.m ? from[j * 8 + 1] : 0.0f;
  }
}

// The compiler knows nothing of products under way and would read sums too early.
template <int kCount>
__device__ inline void hold_sums(float (&sum)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}

// The product of a tile, and its tokens' scales, which come while the last step is under way.
template <int kTokens>
__device__ void multiply_wide(const Args& p, WideStage<kTokens> at, Turn<WideShape<kTokens>::kStages>& turn, int group,
                              int token, float (&scale)[kTokens / 4], float (&sum)[kTokens / 2]) {
  using S = WideShape<kTokens>;
  const int lane = threadIdx.x % 32;
  int before = 0;
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) sum[i] = 0.0f;
  for (int step = 0; step < p.steps; ++step, turn.next()) {
    const uint64_t weights = operand_descriptor(at.weights + (turn.stage * 2 + group) * kWideBytes);
    const uint64_t tokens = operand_descriptor(at.tokens + turn.stage * S::kTokenBytes);
    barrier_wait(at.full + turn.stage * 8, turn.phase);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kInputs / 32; ++i) Wgmma<kTokens>::e4m3(sum, weights + i * 2, tokens + i * 2, 1);
    wgmma_commit();
    wgmma_wait<1>();
    if (step && lane < 2) barrier_arrive_at(at.empty + before * 8, lane);
    before = turn.stage;
  }
  load_token_scales<kTokens>(p, token, scale);
  wgmma_wait<0>();
  hold_sums(sum);
  if (lane < 2) barrier_arrive_at(at.empty + before * 8, lane);
}

// kCount times 16 ranks. All of it: the compiler makes products wait for each other where a branch lies between them.
template <int kTokens, int kCount>
__device__ void multiply_ranks(uint64_t up, uint64_t tokens, float (&sum)[kTokens / 2]) {
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < kCount; ++i) Wgmma<kTokens>::bf16(sum, up + i * 2, tokens + i * 2, 1);
  wgmma_commit();
  wgmma_wait<0>();
  hold_sums(sum);
}

// sum += up x low_rank, the first divided. Products of this shape may only follow the others in the same sums when
// those are done: hence the wait before. Ranks past the last are zeros.
template <int kTokens>
__device__ void add_divided(const Args& p, WideStage<kTokens> at, Turn<WideShape<kTokens>::kStages>& turn, int group,
                            float (&sum)[kTokens / 2]) {
  for (int left = p.rank; left > 0; left -= kRanks, turn.next()) {
    const uint64_t up = operand_descriptor(at.weights + (turn.stage * 2 + group) * kWideBytes);
    const uint64_t tokens = operand_descriptor(at.tokens + turn.stage * WideShape<kTokens>::kTokenBytes);
    barrier_wait(at.full + turn.stage * 8, turn.phase);
    if (left > kRanks / 2) {
      multiply_ranks<kTokens, kRanks / 16>(up, tokens, sum);
    } else {
      multiply_ranks<kTokens, kRanks / 32>(up, tokens, sum);
    }
    if (threadIdx.x % 32 < 2) barrier_arrive_at(at.empty + turn.stage * 8, threadIdx.x % 32);
  }
}

template <int kTokens>
__device__ void compute_wide(const CUtensorMap& out, const Args& p, WideStage<kTokens> at, int cluster, int clusters,
                             uint32_t rank_in_cluster, int group) {
  using S = WideShape<kTokens>;
  const int thread = threadIdx.x % 128, lane = thread % 32;
  Turn<S::kStages> turn;
  for (int tile = cluster; tile < p.tiles; tile += clusters) {
    const int token = tile % p.token_tiles * kTokens;
    const int wanted = (tile / p.token_tiles * 2 + static_cast<int>(rank_in_cluster)) * 2 + group;
    const bool real = wanted < p.panels;
    const int panel = real ? wanted : 0, n = panel * kRows + thread / 32 * 16 + lane / 4;
    const Rows rows(p, n);
    float sum[kTokens / 2], scale[kTokens / 4];
    multiply_wide<kTokens>(p, at, turn, group, token, scale, sum);
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) sum[i] *= scale[i / 4 * 2 + i % 2];
    add_divided<kTokens>(p, at, turn, group, sum);
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) sum[i] *= i & 2 ? rows.high : rows.low;
    finish_sums<kTokens>(p, rows.bias_low, rows.bias_high, sum);
    if (!real) continue;
    if (p.gate) apply_gate<kTokens>(p, n, token, sum);
    if (!p.boxed) {
      store_plain<kTokens>(p, panel, token, sum);
      continue;
    }
#pragma unroll
    for (int first = 0; first < kTokens; first += S::kOut) {
      if (p.y_dtype == DType::bf16) {
        store_boxed<S::kOut, true>(out, p, at.out, group, panel, token + first, sum + first / 2);
      } else {
        store_boxed<S::kOut, false>(out, p, at.out, group, panel, token + first, sum + first / 2);
      }
    }
  }
  if (thread == 0) store_wait_read();  // this shared memory may be another CTA's soon
}

template <int kTokens>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kThreads, 1)
    linear_wide_kernel(const __grid_constant__ CUtensorMap act, const __grid_constant__ CUtensorMap low_rank,
                       const __grid_constant__ CUtensorMap out, const __grid_constant__ Args p) {
  extern __shared__ uint8_t memory[];
  const WideStage<kTokens> at(shared_address(memory));
  const uint32_t rank_in_cluster = blockIdx.x % 2;  // cluster_rank(), but known to be the same in all threads
  const int cluster = blockIdx.x / 2, clusters = gridDim.x / 2;
  if (threadIdx.x == 0) {
    begin_ring<WideShape<kTokens>::kStages>(at.full, at.empty);
    prefetch_map(&act);
    if (p.rank) prefetch_map(&low_rank);
  }
  cluster_sync();
  wait_for_last();
  const int role = warpgroup();
  if (role == 0) {
    give_registers<72>();
    if (threadIdx.x == 0) fetch_wide<kTokens>(act, low_rank, p, at, cluster, clusters, rank_in_cluster);
  } else {
    take_registers<216>();
    compute_wide<kTokens>(out, p, at, cluster, clusters, rank_in_cluster, role - 1);
  }
  cluster_sync();  // no CTA may go while its partner still writes to its shared memory
}

}  // namespace nibble::sm90a
