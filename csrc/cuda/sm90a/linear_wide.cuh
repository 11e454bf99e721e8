// The W4A8 linear of Hopper for many tokens: weights were widened to e4m3 (widen.cuh), both operands lie in shared
// memory.
//
// The sums stay in the matrix units' accumulators over all of K, and the two multiplying warpgroups need no turns:
// while one writes its outputs, the other has the matrix units to itself, as far ahead as the ring of stages lets it
// run.
#pragma once
#include "wgmma_wide.cuh"
#include "widen.cuh"

namespace nibble::sm90a {

template <int kTokens>
struct WideShape {
  static constexpr int kStages = kTokens == 256 ? 4 : kTokens == 192 ? 5 : 6;
  static constexpr int kTokenBytes = kTokens * 128;
  static constexpr int kOut = kTokens == 192 ? 96 : 128;  // tokens that are written at once
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

template <int kTokens>
__device__ void fetch_wide(const CUtensorMap& act, const CUtensorMap& low_rank, const Args& p, WideStage<kTokens> at,
                           int cluster, int clusters, uint32_t rank_in_cluster) {
  using S = WideShape<kTokens>;
  constexpr int kHalf = kTokens / 2;
  Turn<S::kStages> turn;
  for (int tile = cluster; tile < p.tiles; tile += clusters) {
    const int row = tile % p.token_tiles * kTokens + rank_in_cluster * kHalf;
    const int first = (tile / p.token_tiles * 2 + static_cast<int>(rank_in_cluster)) * 2;  // panel
    const int ranks = (p.rank + kRanks - 1) / kRanks;
    for (int step = 0; step < p.steps + ranks; ++step, turn.next()) {
      const uint32_t full = at.full + turn.stage * 8;
      const uint32_t tokens = at.tokens + turn.stage * S::kTokenBytes + rank_in_cluster * kHalf * 128;
      barrier_wait(at.empty + turn.stage * 8, turn.phase ^ 1);
      if (step >= p.steps) {
        barrier_expect(full, S::kTokenBytes);
        copy_box_to_all(tokens, &low_rank, (step - p.steps) * kRanks, row, full, 3);
        continue;
      }
      barrier_expect(full, S::kTokenBytes + 2 * kWideBytes);
      copy_box_to_all(tokens, &act, step * kInputs, row, full, 3);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // A panel past the end (of an odd pair) is fetched from the start: it is multiplied, but never stored.
        const int panel = first + half < p.panels ? first + half : 0;
        copy_bulk(at.weights + (turn.stage * 2 + half) * kWideBytes,
                  p.wide + (int64_t{panel} * p.steps + step) * kWideBytes, kWideBytes, full);
      }
    }
  }
}

// What a thread needs of its two rows once the product is done, fetched before it begins.
template <int kTokens>
struct Rows {
  static constexpr int kAhead = kTokens == 256 ? 1 : 2;  // times 16 ranks: where registers are left
  float low, high;
  uint32_t up[kAhead][4];

  __device__ Rows(const Args& p, int n) {
    low = p.row_most[n] / kLargest, high = p.row_most[n + 8] / kLargest;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (i * 16 < p.rank) load_up(p, n, i * 16, up[i]);
    }
  }
};

// Scales of the tokens in this thread's columns.
template <int kTokens>
__device__ void load_token_scales(const Args& p, int token, float (&scale)[kTokens / 4]) {
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
    const int m = token + j * 8 + threadIdx.x % 4 * 2;
    scale[2 * j] = m < p.m ? p.act_scale[m] : 0.0f;
    scale[2 * j + 1] = m + 1 < p.m ? p.act_scale[m + 1] : 0.0f;
  }
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
  if (lane < 2) barrier_arrive_at(at.empty + before * 8, lane);
  // The compiler knows nothing of products under way and would read sums too early.
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}

// sum += up x low_rank as in linear.cuh, with what Rows holds already.
template <int kTokens>
__device__ void add_low_rank_wide(const Args& p, WideStage<kTokens> at, Turn<WideShape<kTokens>::kStages>& turn, int n,
                                  const Rows<kTokens>& rows, float (&sum)[kTokens / 2]) {
  const int lane = threadIdx.x % 32;
  for (int base = 0; base < p.rank; base += kRanks, turn.next()) {
    barrier_wait(at.full + turn.stage * 8, turn.phase);
    const uint64_t tokens = operand_descriptor(at.tokens + turn.stage * kTokens * 128);
#pragma unroll
    for (int r = 0; r < kRanks; r += 16) {
      if (base + r >= p.rank) break;
      uint32_t a[4];
      if (base == 0 && r < Rows<kTokens>::kAhead * 16) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = rows.up[r / 16 % Rows<kTokens>::kAhead][i];
      } else {
        load_up(p, n, base + r, a);
      }
      hold(a);
      wgmma_fence();
      Wgmma<kTokens>::bf16(sum, a, tokens + r / 8, 1);
      wgmma_commit();
      wgmma_wait();
    }
    if (lane < 2) barrier_arrive_at(at.empty + turn.stage * 8, lane);
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
    const Rows<kTokens> rows(p, n);
    float sum[kTokens / 2], scale[kTokens / 4];
    multiply_wide<kTokens>(p, at, turn, group, token, scale, sum);
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) sum[i] *= scale[i / 4 * 2 + i % 2] * (i & 2 ? rows.high : rows.low);
    const float bias_low = p.bias[n], bias_high = p.bias[n + 8];
    add_low_rank_wide<kTokens>(p, at, turn, n, rows, sum);
    finish_sums<kTokens>(p, bias_low, bias_high, sum);
    if (!real) continue;
    const uint32_t buffer = at.out + group * S::kOutBytes;
    if (!p.boxed) {
      store_plain<kTokens>(p, panel, token, sum);
      continue;
    }
#pragma unroll
    for (int first = 0; first < kTokens; first += S::kOut) {
      if (p.y_dtype == DType::bf16) {
        store_boxed<S::kOut, true>(out, buffer, group, panel, token + first, sum + first / 2);
      } else {
        store_boxed<S::kOut, false>(out, buffer, group, panel, token + first, sum + first / 2);
      }
    }
  }
}

template <int kTokens>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kThreads, 1)
    linear_wide_kernel(const __grid_constant__ CUtensorMap act, const __grid_constant__ CUtensorMap low_rank,
                       const __grid_constant__ CUtensorMap out, const __grid_constant__ Args p) {
  using S = WideShape<kTokens>;
  extern __shared__ uint8_t memory[];
  const WideStage<kTokens> at(shared_address(memory));
  const uint32_t rank_in_cluster = cluster_rank();
  const int cluster = blockIdx.x / 2, clusters = gridDim.x / 2;
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      barrier_init(at.full + i * 8, 1);
      barrier_init(at.empty + i * 8, 16);  // every multiplying warp of both CTAs
    }
    fence_barrier_init();
    prefetch_map(&act);
  }
  cluster_sync();
  // The same in all lanes, and the compiler must know: a warpgroup's products may not lie in a divergent branch.
  const int role = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
  if (role == 0) {
    give_registers<40>();
    if (threadIdx.x == 0) fetch_wide<kTokens>(act, low_rank, p, at, cluster, clusters, rank_in_cluster);
  } else {
    take_registers<232>();
    compute_wide<kTokens>(out, p, at, cluster, clusters, rank_in_cluster, role - 1);
  }
  cluster_sync();  // no CTA may go while its partner still writes to its shared memory
}

}  // namespace nibble::sm90a
