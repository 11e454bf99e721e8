// The W4A8 linear of Hopper for many tokens, again: the product of linear_wide.cuh, bit for bit, but what fetches
// widens the weights to e4m3 on their way to shared memory, instead of a pass over all of them before (widen.cuh).
//
// A warpgroup converts a stage while the matrix units are busy with those before. Each of its threads owns two rows of
// each panel and four inputs of each chunk of 16, as the codes lie in memory. So its loads and stores are whole lines
// and need no trade between lanes: the four words that four lanes store to a chunk fill its 16 bytes, eight rows (by
// the swizzle) all banks.
//
// Its registers and those of the multiplying warpgroups are what 384 threads start with: 72 + 2 * 216 = 3 * 168.
#pragma once
#include "linear_wide.cuh"

namespace nibble::sm90a {

constexpr int kConverting = 4;  // warps that convert
constexpr int kAhead = 5;       // stages between a conversion and its codes' way to the L2

__device__ inline void store_word(uint32_t to, uint32_t word) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(word) : "memory");
}

// Bytes of `from` by the four low digits of `choices`: no masks, which __byte_perm has.
__device__ inline uint32_t permute(uint2 from, uint32_t choices) {
  uint32_t chosen;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(chosen) : "r"(from.x), "r"(from.y), "r"(choices));
  return chosen;
}

// The eight codes of a word (engine/ops/wgmma64.py draws it) to e4m3: `first` those of its first step, `second` those
// of the other. Magnitudes lie there as a byte permutation wants its choices; the signs are put on after it.
__device__ inline void choose_eight(uint32_t word, uint2 from, uint32_t& first, uint32_t& second) {
  const uint32_t near = word & 0x77777777u;
  const uint2 pairs = {permute(from, near), permute(from, near >> 16)};
  first = permute(pairs, 0x6420) ^ (word & 0x80808080u);
  second = permute(pairs, 0x7531) ^ (__funnelshift_r(word, word, 4) & 0x80808080u);
}

// A converting thread's place: rows `low` and `low + 8` of both panels. Of four lanes, each makes the tables of
// magnitudes for one panel and half of a stage's inputs.
struct Place {
  int low, lane, panel, half;

  __device__ Place()
      : low(threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4),
        lane(threadIdx.x % 4),
        panel(threadIdx.x % 2),
        half(threadIdx.x % 4 / 2) {}
};

// The first of a CTA's two panels in a tile. Those past the end are the first ones again: multiplied, never stored.
__device__ inline int first_panel(const Args& p, int tile, uint32_t rank_in_cluster) {
  const int panel = (tile / p.token_tiles * 2 + static_cast<int>(rank_in_cluster)) * 2;
  return panel < p.panels ? panel : 0;
}

// Where a thread's codes and scales lie, stage after stage.
struct Source {
  const uint8_t* codes;
  const uint16_t* scales;
  int tile, step = 0;

  __device__ void begin_tile(const Args& p, Place place, uint32_t rank_in_cluster) {
    const int64_t panel = first_panel(p, tile, rank_in_cluster);
    codes = p.codes + panel * p.steps * kCodeBytes + threadIdx.x * 16;
    scales = p.wscales + ((panel + place.panel) * 2 * p.steps + place.half) * kRows + place.low;
  }

  // After the last stage it stays there.
  __device__ void next(const Args& p, Place place, int clusters, uint32_t rank_in_cluster) {
    if (++step < p.steps) {
      codes += kCodeBytes;
      scales += 2 * kRows;
    } else if (tile + clusters < p.tiles) {
      step = 0, tile += clusters;
      begin_tile(p, place, rank_in_cluster);
    }
  }
};

// A thread's codes and scales of a stage.
struct Portion {
  uint4 codes[4];  // by half, then panel
  uint16_t scales[2];

  __device__ void load(const Args& p, const Source& from) {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const int64_t at = int64_t{part % 2} * p.steps * kCodeBytes + part / 2 * (kCodeBytes / 2);
      codes[part] = *reinterpret_cast<const uint4*>(from.codes + at);
    }
    scales[0] = from.scales[0], scales[1] = from.scales[8];
  }
};

// Two rows' codes of 64 inputs; a lane has four inputs of each chunk. `to` is its place in the panel's first chunk.
__device__ inline void convert_half(const uint4& codes, const uint2 (&tables)[2], int half, uint32_t to) {
  const uint32_t words[2][2] = {{codes.x, codes.z}, {codes.y, codes.w}};
#pragma unroll
  for (int row = 0; row < 2; ++row) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t chunk = half * 4 + i, beside = row * 8 * kInputs;
      uint32_t first, second;
      choose_eight(words[row][i], tables[row], first, second);
      store_word((to ^ chunk << 4) + beside, first);
      store_word((to ^ (chunk + 2) << 4) + beside, second);
    }
  }
}

// A thread's part of a stage. `to`: its place in the first chunk, as the swizzle has it.
__device__ inline void convert(const Portion& from, const float (&units)[2], DType dtype, uint32_t to) {
  uint2 tables[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) tables[row] = magnitudes<false>(units[row] * scale_value(from.scales[row], dtype));
#pragma unroll
  for (int part = 0; part < 4; ++part) {
    uint2 shared[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      shared[row].x = __shfl_sync(0xffffffffu, tables[row].x, part, 4);
      shared[row].y = __shfl_sync(0xffffffffu, tables[row].y, part, 4);
    }
    convert_half(from.codes[part], shared, part / 2, to + part % 2 * kWideBytes);
  }
}

// Two panels' codes and scales of a step come to the L2.
__device__ inline void prefetch_codes(const Args& p, int panel, int step) {
  if (step >= p.steps) return;
  for (int i = panel; i < panel + 2; ++i) {
    const int64_t block = int64_t{i} * p.steps + step;
    prefetch_bulk(p.codes + block * kCodeBytes, kCodeBytes);
    prefetch_bulk(p.wscales + block * 2 * kRows, kScaleBytes);
  }
}

// One thread asks for the tokens as soon as a stage is free, all convert. A stage is full when its bytes came and every
// warp has arrived: in the low-rank branch's stages, which have nothing to convert, too.
template <int kTokens>
struct Converter {
  const CUtensorMap &act, &low_rank;
  const Args& p;
  WideStage<kTokens> at;
  int tile, clusters;
  uint32_t rank_in_cluster;
  Place place;
  Source source;
  Turn<WideShape<kTokens>::kStages> turn;
  int step, panel, row;
  float units[2];

  __device__ void begin_tile() {
    step = 0;
    panel = first_panel(p, tile, rank_in_cluster);
    row = tile % p.token_tiles * kTokens + rank_in_cluster * (kTokens / 2);
    const float* most = p.row_most + (panel + place.panel) * kRows + place.low;
    units[0] = row_unit(most[0]), units[1] = row_unit(most[8]);
  }

  __device__ void begin() {
    source.tile = tile;
    source.begin_tile(p, place, rank_in_cluster);
    begin_tile();
  }

  __device__ void load(Portion& portion) {
    portion.load(p, source);
    source.next(p, place, clusters, rank_in_cluster);
  }

  __device__ void wait() const { barrier_wait(at.empty + turn.stage * 8, turn.phase ^ 1); }

  __device__ void arrive() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(at.full + turn.stage * 8);
    turn.next();
  }

  __device__ void fetch() const {
    fetch_tokens<kTokens>(at, turn.stage, &act, step * kInputs, row, rank_in_cluster, 0);
    // Clusters that share panels run side by side: one asks for all.
    if (row < kTokens) prefetch_codes(p, panel, step + kAhead);
  }

  __device__ void fetch_ranks() {
    const int chunks = (p.rank + kRanks - 1) / kRanks;
    const uint8_t *one = p.wide_up + int64_t{panel} * chunks * kWideBytes, *two = one + int64_t{chunks} * kWideBytes;
#pragma unroll 1
    for (int i = 0; i < chunks; ++i, one += kWideBytes, two += kWideBytes) {
      wait();
      if (threadIdx.x == 0) {
        wait_for_last();  // for what divided the branch; the kernel before wrote nothing else that is read here
        fetch_stage<kTokens>(at, turn.stage, &low_rank, i * kRanks, row, one, two, rank_in_cluster);
      }
      arrive();
    }
  }

  // A stage from `mine`, which then gets what the stage after the next comes from. Whether there is a next.
  __device__ bool convert_stage(Portion& mine) {
    const uint32_t to = at.weights + place.low * kInputs + (place.low % 8 << 4) + place.lane * 4;
    wait();
    if (threadIdx.x == 0) fetch();
    __syncwarp();
    convert(mine, units, p.scale_dtype, to + turn.stage * 2 * kWideBytes);
    fence_async_shared();
    arrive();
    load(mine);
    if (++step < p.steps) return true;
    fetch_ranks();
    tile += clusters;
    if (tile < p.tiles) begin_tile();
    return tile < p.tiles;
  }
};

// Codes are on their way for a whole stage, in registers by turns: the fence of a stage may wait for loads as it does
// for stores.
template <int kTokens>
__device__ void convert_wide(const CUtensorMap& act, const CUtensorMap& low_rank, const Args& p, WideStage<kTokens> at,
                             int cluster, int clusters, uint32_t rank_in_cluster) {
  Converter<kTokens> converter{act, low_rank, p, at, cluster, clusters, rank_in_cluster};
  Portion even, odd;
  converter.begin();
  converter.load(even);
  converter.load(odd);
  while (converter.convert_stage(even) && converter.convert_stage(odd)) {
  }
  __syncwarp();
}

template <int kTokens>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kThreads, 1)
    linear_inline_kernel(const __grid_constant__ CUtensorMap act, const __grid_constant__ CUtensorMap low_rank,
                         const __grid_constant__ CUtensorMap out, const __grid_constant__ Args p) {
  extern __shared__ uint8_t memory[];
  const WideStage<kTokens> at(shared_address(memory));
  // cluster_rank(), but known to the compiler as the same in all threads: else registers spill.
  const uint32_t rank_in_cluster = blockIdx.x % 2;
  const int cluster = blockIdx.x / 2, clusters = gridDim.x / 2;
  if (threadIdx.x == 0) {
    begin_ring<WideShape<kTokens>::kStages>(at.full, at.empty, 1 + kConverting);
    prefetch_map(&act);
    if (p.rank) prefetch_map(&low_rank);
  }
  cluster_sync();
  const int role = warpgroup();
  if (role == 0) {
    give_registers<72>();
    convert_wide<kTokens>(act, low_rank, p, at, cluster, clusters, rank_in_cluster);
  } else {
    take_registers<216>();
    compute_wide<kTokens>(out, p, at, cluster, clusters, rank_in_cluster, role - 1);
  }
  cluster_sync();  // no CTA may go while its partner still writes to its shared memory
}

}  // namespace nibble::sm90a
