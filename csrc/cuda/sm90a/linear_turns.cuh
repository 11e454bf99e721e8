// linear_wide.cuh with a tile for each multiplying warpgroup: they take tiles in turns, so that one's scales, low-rank
// branch and outputs are hidden behind the other's product. A warpgroup holds the sums of both panels of its tile.
//
// A warpgroup may wait for a stage only when the other has seen all stages before it: a barrier tells neighbouring
// passes round the ring apart, not those further away. So turns are given (linear.cuh) as soon as a tile's last stage
// has come, while its products are still under way.
#pragma once
#include "linear_wide.cuh"

namespace nibble::sm90a {

constexpr int kTurnTokens = 128;
using TurnStage = WideStage<kTurnTokens>;
using TurnRing = Turn<WideShape<kTurnTokens>::kStages>;
using TurnSums = float[2][kTurnTokens / 2];  // of the two panels of a tile

// Past the stages of a tile that is the other warpgroup's.
__device__ inline void skip(TurnRing& turn, int stages) {
  constexpr int kStages = WideShape<kTurnTokens>::kStages;
  const int to = turn.stage + stages;
  turn.phase ^= to / kStages & 1;
  turn.stage = to % kStages;
}

// The product of a tile, and its tokens' scales, which come while the last step is under way. `give`: whether the turn
// goes to the other warpgroup here, which is when the one low-rank stage has come too.
__device__ inline void multiply_turn(const Args& p, TurnStage at, TurnRing& turn, int group, bool give, int token,
                                     float (&scale)[kTurnTokens / 4], TurnSums& sum) {
  using S = WideShape<kTurnTokens>;
  const int lane = threadIdx.x % 32;
  int before = 0;
#pragma unroll
  for (int i = 0; i < kTurnTokens; ++i) sum[i % 2][i / 2] = 0.0f;
  for (int step = 0; step < p.steps; ++step, turn.next()) {
    const uint64_t tokens = operand_descriptor(at.tokens + turn.stage * S::kTokenBytes);
    const uint64_t weights[2] = {operand_descriptor(at.weights + turn.stage * 2 * kWideBytes),
                                 operand_descriptor(at.weights + (turn.stage * 2 + 1) * kWideBytes)};
    barrier_wait(at.full + turn.stage * 8, turn.phase);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kInputs / 32; ++i) {
      Wgmma<kTurnTokens>::e4m3(sum[0], weights[0] + i * 2, tokens + i * 2, 1);
      Wgmma<kTurnTokens>::e4m3(sum[1], weights[1] + i * 2, tokens + i * 2, 1);
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (step && lane < 2) barrier_arrive_at(at.empty + before * 8, lane);
    before = turn.stage;
  }
  if (give) {
    if (p.rank) barrier_wait(at.full + turn.stage * 8, turn.phase);
    give_turn(group);
  }
  load_token_scales<kTurnTokens>(p, token, scale);
  wgmma_wait<0>();
  if (lane < 2) barrier_arrive_at(at.empty + before * 8, lane);
  // The compiler knows nothing of products under way and would read sums too early.
#pragma unroll
  for (int i = 0; i < kTurnTokens; ++i) asm volatile("" : "+f"(sum[i % 2][i / 2])::"memory");
}

// sum += up x low_rank as in linear.cuh, for both panels; n is this thread's row in each. `give`: as above, where there
// are more stages than one.
__device__ inline void add_low_rank_turn(const Args& p, TurnStage at, TurnRing& turn, int group, bool give,
                                         const int (&n)[2], TurnSums& sum) {
  const int lane = threadIdx.x % 32;
  for (int base = 0; base < p.rank; base += kRanks, turn.next()) {
    barrier_wait(at.full + turn.stage * 8, turn.phase);
    if (give && base + kRanks >= p.rank) give_turn(group);
    const uint64_t tokens = operand_descriptor(at.tokens + turn.stage * kTurnTokens * 128);
#pragma unroll
    for (int r = 0; r < kRanks; r += 16) {
      if (base + r >= p.rank) break;
      uint32_t up[2][4];
      load_up(p, n[0], base + r, up[0]);
      load_up(p, n[1], base + r, up[1]);
      hold(up[0]);
      hold(up[1]);
      wgmma_fence();
      Wgmma<kTurnTokens>::bf16(sum[0], up[0], tokens + r / 8, 1);
      Wgmma<kTurnTokens>::bf16(sum[1], up[1], tokens + r / 8, 1);
      wgmma_commit();
      wgmma_wait();
    }
    if (lane < 2) barrier_arrive_at(at.empty + turn.stage * 8, lane);
  }
#pragma unroll
  for (int i = 0; i < kTurnTokens; ++i) asm volatile("" : "+f"(sum[i % 2][i / 2])::"memory");
}

__device__ inline void store_turn(const CUtensorMap& out, const Args& p, uint32_t buffer, int group, int panel,
                                  int token, const float (&sum)[kTurnTokens / 2]) {
  if (!p.boxed) {
    store_plain<kTurnTokens>(p, panel, token, sum);
  } else if (p.y_dtype == DType::bf16) {
    store_boxed<kTurnTokens, true>(out, buffer, group, panel, token, sum);
  } else {
    store_boxed<kTurnTokens, false>(out, buffer, group, panel, token, sum);
  }
}

__device__ inline void compute_turns(const CUtensorMap& out, const Args& p, TurnStage at, int cluster, int clusters,
                                     uint32_t rank_in_cluster, int group) {
  using S = WideShape<kTurnTokens>;
  const int thread = threadIdx.x % 128, lane = thread % 32;
  const int stages = p.steps + (p.rank + kRanks - 1) / kRanks;
  TurnRing turn;
  if (group == 1) {
    skip(turn, stages);
    give_turn(1);  // the first turn is the first warpgroup's
  }
  for (int tile = cluster + group * clusters; tile < p.tiles; tile += 2 * clusters, skip(turn, stages)) {
    const int token = tile % p.token_tiles * kTurnTokens;
    const int first = (tile / p.token_tiles * 2 + static_cast<int>(rank_in_cluster)) * 2;
    const bool real[2] = {first < p.panels, first + 1 < p.panels};
    const int row = thread / 32 * 16 + lane / 4;
    const int n[2] = {(real[0] ? first : 0) * kRows + row, (real[1] ? first + 1 : 0) * kRows + row};
    const bool give = tile + clusters < p.tiles, early = p.rank <= kRanks;
    float scale[kTurnTokens / 4];
    TurnSums sum;
    wait_for_turn(group);
    multiply_turn(p, at, turn, group, give && early, token, scale, sum);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float low = p.row_most[n[half]] / kLargest, high = p.row_most[n[half] + 8] / kLargest;
#pragma unroll
      for (int i = 0; i < kTurnTokens / 2; ++i) sum[half][i] *= scale[i / 4 * 2 + i % 2] * (i & 2 ? high : low);
    }
    add_low_rank_turn(p, at, turn, group, give && !early, n, sum);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      finish_sums<kTurnTokens>(p, p.bias[n[half]], p.bias[n[half] + 8], sum[half]);
      if (real[half]) store_turn(out, p, at.out + group * S::kOutBytes, group, first + half, token, sum[half]);
    }
  }
  if (thread == 0) store_wait_read();  // shared memory goes with the CTA
}

__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kThreads, 1)
    linear_turns_kernel(const __grid_constant__ CUtensorMap act, const __grid_constant__ CUtensorMap low_rank,
                        const __grid_constant__ CUtensorMap out, const __grid_constant__ Args p) {
  using S = WideShape<kTurnTokens>;
  extern __shared__ uint8_t memory[];
  const TurnStage at(shared_address(memory));
  const uint32_t rank_in_cluster = cluster_rank();
  const int cluster = blockIdx.x / 2, clusters = gridDim.x / 2;
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      barrier_init(at.full + i * 8, 1);
      barrier_init(at.empty + i * 8, 8);  // every warp, in both CTAs, of the warpgroup whose tile it is
    }
    fence_barrier_init();
    prefetch_map(&act);
  }
  cluster_sync();
  // The same in all lanes, and the compiler must know: a warpgroup's products may not lie in a divergent branch.
  const int role = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
  if (role == 0) {
    give_registers<40>();
    if (threadIdx.x == 0) fetch_wide<kTurnTokens>(act, low_rank, p, at, cluster, clusters, rank_in_cluster);
  } else {
    take_registers<232>();
    compute_turns(out, p, at, cluster, clusters, rank_in_cluster, role - 1);
  }
  cluster_sync();  // no CTA may go while its partner still writes to its shared memory
}

}  // namespace nibble::sm90a
