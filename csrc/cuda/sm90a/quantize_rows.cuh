// The pass of quantize.cuh for whole rows and a CTA alone on its multiprocessor. There, three times K = 3072 is spent
// on what a form with two CTAs a multiprocessor, all of them in step, cannot hide behind each other:
//
// - Up to 36 tokens share one read of `down`, which the L2 delivers to every CTA anew (2 x 197 KB for two linears).
// - Rows come in three steps of 12. A warp takes the statistics of one row of a step, in one read of shared memory;
//   a thread then owns eight columns of the step's tokens. Meanwhile the next step is on its way.
// - Some warps multiply by `down` while others write codes: one waits for the L2, the other for nothing.
// - Where there are few tokens, `down` takes the shared memory that they leave: read ahead, while rows are worked on.
//
// Codes, scales and the order of a token's sums are quantize.cuh's, wherever the token is.
#pragma once
#include "quantize.cuh"

namespace nibble::sm90a {

constexpr int kRowsTokens = 36, kRowsWarps = 12, kRowsThreads = kRowsWarps * 32;
constexpr int kRowsInputs = kRowsThreads * 8;  // at most: a thread has eight columns
constexpr int kRowsRanks = 32;                 // at most
constexpr int kRowsSteps = kRowsTokens / kRowsWarps, kRowsBlocks = (kRowsTokens + 7) / 8;
constexpr int kFewBlocks = 2;                  // of eight tokens: all that there are in a small picture
constexpr int kAhead = 3;                      // a warp's runs of 32 inputs whose part of `down` is on its way
constexpr int kRowsSumPitch = kRowsRanks + 4;  // floats: eight ranks of four tokens then meet in no bank

struct RowsShared {
  uint64_t arrived[kRowsSteps], ahead;  // rows, and what is read ahead of `down`
  float mean[kRowsTokens], inverse[kRowsTokens];
  float of_warp[2][kRowsWarps][kRowsTokens];  // largest values, for each target
  float by[2][kRowsTokens];                   // what makes codes of smoothed values
};

struct Rows {
  const QuantizeFp8& p;
  RowsShared& shared;
  uint8_t* rows;  // of `pitch` bytes; at the end, the warps' sums
  uint4* ahead;   // of each target, what belongs to the first `runs_ahead` runs of 32 inputs
  int tokens, first_token, inputs, pitch, runs_ahead, warp, lane;

  __device__ uint4& at(int token, int input) const {
    return *reinterpret_cast<uint4*>(rows + token * pitch + input * 2);
  }
  __device__ int tokens_until(int step) const { return min((step + 1) * kRowsWarps, tokens); }
  __device__ int vectors_ahead(int target) const {
    return runs_ahead * static_cast<int>(p.target[target].rank / 8) * 32;
  }
  __device__ uint4* ahead_of(int target) const { return ahead + (target ? vectors_ahead(0) : 0); }
};

__device__ inline void fetch_rows(const Rows& s) {
  if (threadIdx.x == 0) {
    for (uint64_t& barrier : s.shared.arrived) barrier_init(shared_address(&barrier), 1);
    barrier_init(shared_address(&s.shared.ahead), 1);
    fence_barrier_init();
  }
  __syncthreads();
  const int bytes = s.inputs * 2;
  for (int first = 0; first < s.tokens && s.warp == 0; first += kRowsWarps) {
    const int step = first / kRowsWarps, t = first + s.lane;
    const uint32_t barrier = shared_address(&s.shared.arrived[step]);
    if (s.lane == 0) barrier_expect(barrier, (s.tokens_until(step) - first) * bytes);
    __syncwarp();
    if (t < s.tokens_until(step)) {
      copy_bulk(shared_address(&s.at(t, 0)), vector_at(s.p.x, int64_t{s.first_token + t} * s.p.x_stride), bytes,
                barrier);
    }
  }
  if (threadIdx.x == 0) {
    const uint32_t barrier = shared_address(&s.shared.ahead);
    const int second = s.p.targets == 2 ? s.vectors_ahead(1) * 16 : 0, first = s.vectors_ahead(0) * 16;
    barrier_expect(barrier, first + second);
    if (first) copy_bulk(shared_address(s.ahead_of(0)), s.p.target[0].down, first, barrier);
    if (second) copy_bulk(shared_address(s.ahead_of(1)), s.p.target[1].down, second, barrier);
  }
}

// Mean and inverse deviation of a row, by a warp that reads it once; sums in the order of row_statistics.
__device__ inline void take_statistics(const Rows& s, int t) {
  constexpr int kChunks = kRowsInputs / 256;
  float v[kChunks][8];
  const auto real = [&](int chunk) { return chunk * 256 + s.lane * 8 < s.inputs; };
#pragma unroll
  for (int c = 0; c < kChunks; ++c) unpack_eight(real(c) ? s.at(t, c * 256 + s.lane * 8) : uint4{}, v[c]);
#pragma unroll  // kept as they are: else the compiler unpacks them a second time
  for (int i = 0; i < kChunks * 8; ++i) asm volatile("" : "+f"(v[i / 8][i % 8]));
  float sum = 0.0f, squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kChunks * 8; ++i) sum += v[i / 8][i % 8];
  const float mean = warp_sum(sum) / s.p.k;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (!real(c)) break;
#pragma unroll
    for (int j = 0; j < 8; ++j) squares = fmaf(v[c][j] - mean, v[c][j] - mean, squares);
  }
  squares = warp_sum(squares) / s.p.k;
  if (s.lane == 0) s.shared.mean[t] = mean, s.shared.inverse[t] = rsqrtf(squares + s.p.eps);
}

// A thread's eight columns, and what is kept of them from step to step.
template <int kTargets, bool kNorm>
struct Owner {
  const int column;
  const bool real;
  const Columns<kTargets> columns;
  Modulation modulation;
  int known_until = 0;  // the token with which `modulation` ends

  __device__ explicit Owner(const Rows& s)
      : column(static_cast<int>(threadIdx.x) * 8), real(column < s.inputs), columns(s.p, column, real) {
    take_sample(s, 0);
  }
  __device__ void take_sample(const Rows& s, int t) {
    known_until = kNorm ? modulation.take(s.p, s.first_token + t, column, real) - s.first_token : s.tokens;
  }
};

// Tokens `t` to `until`: [normalizes, and] leaves the largest values in of_warp.
template <int kTargets, bool kNorm>
__device__ inline void look_at_columns(const Rows& s, Owner<kTargets, kNorm>& mine, int t, int until) {
  while (t < until) {
    if (t == mine.known_until) mine.take_sample(s, t);
    const int end = min(mine.known_until, until);
#pragma unroll 4
    for (; t < end; ++t) {
      float v[8], largest[kTargets];
      uint4 raw{};
      if (mine.real) raw = s.at(t, mine.column);
      unpack_eight(raw, v);
      if (kNorm) {
        raw = mine.modulation.apply(s.shared.mean[t], s.shared.inverse[t], v);
        if (mine.real) s.at(t, mine.column) = raw;
      }
      largest_of(mine.columns, v, largest);
#pragma unroll
      for (int target = 0; target < kTargets; ++target) {
        if (s.lane == 0) s.shared.of_warp[target][s.warp][t] = largest[target];
      }
    }
  }
}

template <int kTargets>
__device__ inline void choose_scales(const Rows& s) {
  __syncthreads();
  const int target = threadIdx.x / kRowsTokens, t = threadIdx.x % kRowsTokens;
  if (target < kTargets && t < s.tokens) {
    float largest = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kRowsWarps; ++warp) largest = fmaxf(largest, s.shared.of_warp[target][warp][t]);
    const bool nothing = largest < kTinyMax;
    s.shared.by[target][t] = nothing ? 0.0f : kLargestE4m3 / largest;
    s.p.target[target].scales[s.first_token + t] = nothing ? 0.0f : largest * (1.0f / kLargestE4m3);
  }
  __syncthreads();
}

template <int kTargets>
__device__ inline void write_codes(const Rows& s) {
  const int column = static_cast<int>(threadIdx.x) * 8;
  if (column >= s.inputs) return;
  const Columns<kTargets> columns(s.p, column, true);  // read again: the products want their registers
  int64_t place = int64_t{s.first_token} * s.inputs + column;
#pragma unroll 4
  for (int t = 0; t < s.tokens; ++t, place += s.inputs) {
    float v[8];
    unpack_eight(s.at(t, column), v);
#pragma unroll
    for (int target = 0; target < kTargets; ++target) columns.write(s.p, target, place, v, s.shared.by[target][t]);
  }
}

// A warp's sums for a target, as the matrix units leave them: ranks down, tokens across.
using RowsSums = float[kRowsRanks / 16][kRowsBlocks][4];

// A run of 32 inputs, for the tokens of blocks kFrom to kTo: no branches between them, so their reads are under way
// together. A block past the last token reads that one, for nobody.
template <int kFrom, int kTo>
__device__ inline void multiply_run(const Rows& s, int run, const uint4 (&down)[kRowsRanks / 8], RowsSums& d) {
  uint4 v[kTo - kFrom];
#pragma unroll
  for (int i = 0; i < kTo - kFrom; ++i) {
    v[i] = s.at(min((kFrom + i) * 8 + s.lane / 4, s.tokens - 1), run * 32 + s.lane % 4 * 8);
  }
#pragma unroll
  for (int i = 0; i < kTo - kFrom; ++i) {
#pragma unroll
    for (int m = 0; m < kRowsRanks / 16; ++m) {
      multiply_16(d[m][kFrom + i], down[2 * m], v[i].x, v[i].y);
      multiply_16(d[m][kFrom + i], down[2 * m + 1], v[i].z, v[i].w);
    }
  }
}

// A warp's runs are `warp`, `warp` + 12 and so on.
__device__ inline void multiply_down(const Rows& s, int target, RowsSums& d) {
  const int runs = s.inputs / 32, tiles = static_cast<int>(s.p.target[target].rank / 8);
  const uint4 *rest = static_cast<const uint4*>(s.p.target[target].down), *ahead = s.ahead_of(target);
  uint4 down[kAhead][kRowsRanks / 8] = {};
  const auto fetch = [&](int slot, int run) {
    const uint4* from = (run < s.runs_ahead ? ahead : rest) + run * tiles * 32 + s.lane;
#pragma unroll
    for (int tile = 0; tile < kRowsRanks / 8; ++tile) {
      if (run < runs && tile < tiles) down[slot][tile] = from[tile * 32];
    }
  };
#pragma unroll
  for (int slot = 0; slot < kAhead; ++slot) fetch(slot, s.warp + slot * kRowsWarps);
#pragma unroll 1
  for (int first = s.warp; first < runs; first += kAhead * kRowsWarps) {
#pragma unroll
    for (int slot = 0; slot < kAhead; ++slot) {
      const int run = first + slot * kRowsWarps;
      if (run >= runs) break;
      multiply_run<0, kFewBlocks>(s, run, down[slot], d);
      if (s.tokens > kFewBlocks * 8) multiply_run<kFewBlocks, kRowsBlocks>(s, run, down[slot], d);
      fetch(slot, run + kAhead * kRowsWarps);
    }
  }
}

// Adds the warps' sums in their order; they take the place of the rows.
template <int kTargets>
__device__ inline void finish_projections(const Rows& s, const RowsSums (&d)[kTargets]) {
  const int room = s.tokens * kRowsSumPitch;
  auto* sums = reinterpret_cast<float*>(s.rows);
  __syncthreads();
#pragma unroll
  for (int target = 0; target < kTargets; ++target) {
#pragma unroll
    for (int i = 0; i < kRowsRanks / 16 * kRowsBlocks * 4; ++i) {
      const int m = i / (kRowsBlocks * 4), block = i / 4 % kRowsBlocks, of = i % 4;
      const int t = block * 8 + s.lane % 4 * 2 + of % 2, rank = m * 16 + s.lane / 4 + of / 2 * 8;
      if (t < s.tokens)
        sums[(target * kRowsWarps + s.warp) * room + t * kRowsSumPitch + rank] = d[target][m][block][of];
    }
  }
  __syncthreads();
#pragma unroll
  for (int target = 0; target < kTargets; ++target) {
    const QuantizeTarget& to = s.p.target[target];
    for (int i = threadIdx.x; i < s.tokens * (kRowsRanks / 2); i += kRowsThreads) {
      const int t = i / (kRowsRanks / 2), rank = i % (kRowsRanks / 2) * 2;
      if (rank >= to.rank) continue;
      float2 sum{};
#pragma unroll
      for (int warp = 0; warp < kRowsWarps; ++warp) {
        const float* from = sums + (target * kRowsWarps + warp) * room + t * kRowsSumPitch + rank;
        sum.x += from[0], sum.y += from[1];
      }
      const int64_t place = int64_t{s.first_token + t} * to.rank + rank;
      *reinterpret_cast<uint32_t*>(static_cast<__nv_bfloat16*>(to.low_rank) + place) = pack_two(sum.x, sum.y);
    }
  }
}

// Shared memory for `tokens` rows, or what their sums take instead.
__host__ __device__ constexpr int64_t rows_bytes(int64_t tokens, int64_t pitch, int targets) {
  const int64_t sums = int64_t{targets} * kRowsWarps * kRowsSumPitch * 4;
  return tokens * (pitch > sums ? pitch : sums);
}

// Of how many runs of 32 inputs `down` fits into so many bytes, for every target.
template <int kTargets>
__device__ inline int runs_that_fit(const QuantizeFp8& p, int bytes) {
  const int of_run = static_cast<int>(p.target[0].rank + (kTargets == 2 ? p.target[1].rank : 0)) * 64;
  return of_run ? min(bytes / of_run, static_cast<int>(p.k / 32)) : 0;
}

// `tokens` of a CTA, rows of `pitch` bytes.
template <int kTargets, bool kNorm>
__global__ void __launch_bounds__(kRowsThreads, 1)
    quantize_rows_kernel(const __grid_constant__ QuantizeFp8 p, int tokens, int pitch) {
  extern __shared__ __align__(128) uint8_t memory[];
  __shared__ RowsShared shared;
  const int first = static_cast<int>(blockIdx.x) * tokens, inputs = static_cast<int>(p.k);
  const int taken = static_cast<int>(rows_bytes(tokens, pitch, kTargets));
  const Rows s{p,
               shared,
               memory,
               reinterpret_cast<uint4*>(memory + taken),
               min(tokens, static_cast<int>(p.m) - first),
               first,
               inputs,
               pitch,
               runs_that_fit<kTargets>(p, dynamic_shared_bytes() - taken),
               warp_in_block(),
               static_cast<int>(threadIdx.x % 32)};
  fetch_rows(s);
  Owner<kTargets, kNorm> mine(s);
  for (int begin = 0; begin < s.tokens; begin += kRowsWarps) {
    const int step = begin / kRowsWarps;
    barrier_wait(shared_address(&shared.arrived[step]), 0);
    if (kNorm) {
      if (begin + s.warp < s.tokens) take_statistics(s, begin + s.warp);
      __syncthreads();
    }
    look_at_columns(s, mine, begin, s.tokens_until(step));
  }
  choose_scales<kTargets>(s);
  barrier_wait(shared_address(&shared.ahead), 0);
  RowsSums d[kTargets] = {};
  // Of the three warps on each scheduler two begin with the product and one with the codes.
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    if ((s.warp / 4 + half) % 2) {
      write_codes<kTargets>(s);
    } else {
#pragma unroll
      for (int target = 0; target < kTargets; ++target) {
        if (p.target[target].rank) multiply_down(s, target, d[target]);
      }
    }
  }
  finish_projections<kTargets>(s, d);
}

}  // namespace nibble::sm90a
