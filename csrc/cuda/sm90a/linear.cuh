// The W4A8 linear of Hopper: y = 4-bit weights x e4m3 tokens, group scales, low-rank branch, bias.
//
// Weights are the A operand of wgmma and come from registers: a 4-bit code in sign and magnitude becomes an e4m3 number
// by a mask alone, because e4m3's subnormals and first normals are linear: byte 0b0000_0mmm is mmm * 2^-9. Tokens are
// the B operand. A thread of D then holds two outputs and many tokens, so a group's scale is one register a row, and
// promoting a partial sum of 64 inputs is one FMA an element. Two warpgroups take turns: one promotes while the other
// multiplies. Left to themselves they fall into step, and the matrix units wait for both (half the speed, measured).
//
// A cluster of two CTAs shares a tile of tokens (each fetches half of it for both) and takes 128 outputs each: at
// FP8's full rate a CTA alone would ask more of the L2 than it gives.
#pragma once
#include "../common/heads.cuh"
#include "../kernels.h"
#include "pairs.cuh"
#include "ptx.cuh"
#include "wgmma.cuh"

namespace nibble::sm90a {

constexpr int kThreads = 384;  // a warpgroup that fetches, two that multiply
constexpr int kRows = 64;      // outputs of a warpgroup
constexpr int kInputs = 128;   // of K, in one stage: a row of 128 bytes
constexpr int kCodeBytes = kRows * kInputs / 2;
constexpr int kScaleBytes = kRows * (kInputs / 64) * 2;
constexpr int kRanks = 64;        // of the low-rank branch, in one stage: a row of 128 bytes too
constexpr float kCodeUnit = 512;  // 2^9, what the mask leaves out

template <int kTokens>
struct Shape {
  static constexpr int kStages = kTokens > 128 ? 5 : kTokens == 128 ? 7 : 8;
  static constexpr int kTokenBytes = kTokens * 128;
  static constexpr int kOutBytes = kTokens * kRows * 2;
  static constexpr int kShared = kStages * (kTokenBytes + 2 * kCodeBytes + 2 * kScaleBytes) + 2 * kOutBytes +
                                 2 * kStages * 8 + 1024;  // the last for alignment
};

struct Args {
  const uint8_t* codes;
  const uint16_t* wscales;
  const uint16_t* up;
  const float* bias;
  const float* act_scale;
  const uint8_t *wide, *wide_up;  // weights in e4m3, see widen.cuh, and the up-projection, see divide.cuh
  const float* row_most;
  void* y;
  int m, n_valid, panels, steps, rank, token_tiles, tiles;
  DType scale_dtype, y_dtype;
  bool boxed;            // whether y can be written by the copy engine
  bool gelu;             // y = gelu(y), in its tanh form
  const uint16_t* gate;  // y += gate * (what else were y)
  int64_t gate_stride;
  int tokens_per_sample;
  const void* angles;  // of queries and keys, see LinearFp8
  const uint16_t *norm_q, *norm_k;
  float eps;
  int heads, first_position;
};

// 0.5 v (1 + tanh(sqrt(2 / pi) (v + 0.044715 v^3))), the tanh by the special function unit: right to 2^-11.
__device__ inline float gelu(float v) {
  float t;
  asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(v * fmaf(0.0356774081f, v * v, 0.7978845608f)));
  const float half = 0.5f * v;
  return fmaf(half, t, half);
}

__device__ inline float scale_value(uint16_t bits, DType dtype) {
  return dtype == DType::bf16 ? __uint_as_float(uint32_t{bits} << 16) : __half2float(__ushort_as_half(bits));
}

template <bool kBfloat16>
__device__ inline uint32_t pair(float low, float high) {
  return kBfloat16 ? pack_two(low, high) : pack_two_halves(low, high);
}

// Where everything lies in shared memory; addresses of the shared window.
template <int kTokens>
struct Stage {
  using S = Shape<kTokens>;
  uint32_t tokens, codes, scales, out, full, empty;

  __device__ explicit Stage(uint32_t base) {
    tokens = (base + 1023) & ~1023u;
    codes = tokens + S::kStages * S::kTokenBytes;
    out = codes + S::kStages * 2 * kCodeBytes;
    scales = out + 2 * S::kOutBytes;
    full = scales + S::kStages * 2 * kScaleBytes;
    empty = full + S::kStages * 8;
  }
};

// Goes round the stages of the ring: which one, and in which phase its barriers are.
template <int kStages>
struct Turn {
  int stage = 0;
  uint32_t phase = 0;
  __device__ void next() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

template <int kTokens>
__device__ void fetch(const CUtensorMap& act, const CUtensorMap& low_rank, const Args& p, Stage<kTokens> at,
                      int cluster, int clusters, uint32_t rank_in_cluster) {
  using S = Shape<kTokens>;
  constexpr int kHalf = kTokens / 2;
  Turn<S::kStages> turn;
  for (int tile = cluster; tile < p.tiles; tile += clusters) {
    const int row = tile % p.token_tiles * kTokens + rank_in_cluster * kHalf;
    const int first = (tile / p.token_tiles * 2 + static_cast<int>(rank_in_cluster)) * 2;  // panel
    const int ranks = (p.rank + kRanks - 1) / kRanks;
    for (int step = 0; step < p.steps + ranks; ++step, turn.next()) {
      const uint32_t full = at.full + turn.stage * 8;
      barrier_wait(at.empty + turn.stage * 8, turn.phase ^ 1);
      const uint32_t tokens = at.tokens + turn.stage * S::kTokenBytes + rank_in_cluster * kHalf * 128;
      if (step >= p.steps) {
        barrier_expect(full, S::kTokenBytes);
        copy_box_to_all(tokens, &low_rank, (step - p.steps) * kRanks, row, full, 3);
        continue;
      }
      barrier_expect(full, S::kTokenBytes + 2 * kCodeBytes + 2 * kScaleBytes);
      copy_box_to_all(tokens, &act, step * kInputs, row, full, 3);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // A panel past the end (of an odd pair) is fetched from the start: it is multiplied, but never stored.
        const int panel = first + half < p.panels ? first + half : 0;
        const int64_t block = int64_t{panel} * p.steps + step;
        copy_bulk(at.codes + (turn.stage * 2 + half) * kCodeBytes, p.codes + block * kCodeBytes, kCodeBytes, full);
        copy_bulk(at.scales + (turn.stage * 2 + half) * kScaleBytes,
                  reinterpret_cast<const uint8_t*>(p.wscales) + block * kScaleBytes, kScaleBytes, full);
      }
    }
  }
}

__device__ inline uint4 load_words(uint32_t address) {
  uint4 w;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w)
               : "r"(address)
               : "memory");
  return w;
}

__device__ inline uint16_t load_half(uint32_t address) {
  uint16_t v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address));
  return v;
}

__device__ inline void store_words(uint32_t address, const uint4& w) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w)
               : "memory");
}

// Registers are ready here: the compiler may not compute them later, past the fence before a product.
__device__ inline void hold(uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[i])::"memory");
}

// Eight codes a word: as it stands those of one 32-input step, turned by four bits those of the next.
__device__ inline void widen(const uint4& w, uint32_t (&first)[4], uint32_t (&second)[4]) {
  const uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    first[i] = words[i] & 0x87878787u;
    second[i] = __funnelshift_r(words[i], words[i], 4) & 0x87878787u;
  }
}

// The turns of the two warpgroups: named barriers 3 and 4, which one waits at and the other arrives at.
__device__ inline void wait_for_turn(int group) {
  if (group == 0) {
    asm volatile("bar.sync 3, 256;" ::: "memory");
  } else {
    asm volatile("bar.sync 4, 256;" ::: "memory");
  }
}

__device__ inline void give_turn(int group) {
  if (group == 0) {
    asm volatile("bar.arrive 4, 256;" ::: "memory");
  } else {
    asm volatile("bar.arrive 3, 256;" ::: "memory");
  }
}

// sum += scale * part, after a wait: the compiler knows nothing of products under way and would read `part` too early.
template <int kCount>
__device__ inline void promote(float (&part)[kCount], float low, float high, float (&sum)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(part[i])::"memory");
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum[i] = fmaf(part[i], i & 2 ? high : low, sum[i]);
}

// `last`: no further tile follows, so the second warpgroup gives its last turn to nobody.
template <int kTokens>
__device__ void multiply(const Args& p, Stage<kTokens> at, Turn<Shape<kTokens>::kStages>& turn, int group, bool last,
                         float (&sum)[kTokens / 2]) {
  using S = Shape<kTokens>;
  const int thread = threadIdx.x % 128, lane = thread % 32;
  const uint32_t row = (thread / 32 * 16 + lane / 4) * 2;
  float part[kTokens / 2];
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) sum[i] = 0.0f;
  for (int step = 0; step < p.steps; ++step, turn.next()) {
    const int panel = turn.stage * 2 + group;
    const uint32_t codes = at.codes + panel * kCodeBytes + thread * 16;
    const uint32_t scales = at.scales + panel * kScaleBytes + row;
    const uint64_t tokens = operand_descriptor(at.tokens + turn.stage * S::kTokenBytes);
    barrier_wait(at.full + turn.stage * 8, turn.phase);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t first[4], second[4];
      widen(load_words(codes + half * (kCodeBytes / 2)), first, second);
      const float low = scale_value(load_half(scales + half * 128), p.scale_dtype);
      const float high = scale_value(load_half(scales + half * 128 + 16), p.scale_dtype);
      hold(first);
      hold(second);
      wait_for_turn(group);
      wgmma_fence();
      Wgmma<kTokens>::e4m3_new(part, first, tokens + half * 4);
      wgmma_commit();
      Wgmma<kTokens>::e4m3(part, second, tokens + half * 4 + 2, 1);
      wgmma_commit();
      wgmma_wait<1>();  // the first of two: the other warpgroup's products get in line while the second runs
      if (group == 0 || half == 0 || step + 1 < p.steps || !last) give_turn(group);
      wgmma_wait<0>();
      if (half == 1 && lane < 2) barrier_arrive_at(at.empty + turn.stage * 8, lane);
      promote(part, low, high, sum);
    }
  }
}

// Operand A of 16 ranks from `rank` on: of row n and of row n + 8 the ranks of this lane, twice.
__device__ inline void load_up(const Args& p, int n, int rank, uint32_t (&a)[4]) {
  const uint16_t* up = p.up + int64_t{n} * p.rank + rank + threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = *reinterpret_cast<const uint32_t*>(up + int64_t{i % 2 * 8} * p.rank + i / 2 * 8);
}

// sum += up x low_rank, both in 16 bits: `up` comes from registers, the tokens' projections through the ring.
template <int kTokens>
__device__ void add_low_rank(const Args& p, Stage<kTokens> at, Turn<Shape<kTokens>::kStages>& turn, int panel,
                             float (&sum)[kTokens / 2]) {
  const int thread = threadIdx.x % 128, lane = thread % 32, n = panel * kRows + thread / 32 * 16 + lane / 4;
  for (int base = 0; base < p.rank; base += kRanks, turn.next()) {
    barrier_wait(at.full + turn.stage * 8, turn.phase);
    const uint64_t tokens = operand_descriptor(at.tokens + turn.stage * kTokens * 128);
    for (int r = 0; r < kRanks && base + r < p.rank; r += 16) {
      uint32_t a[4];
      load_up(p, n, base + r, a);
      hold(a);
      wgmma_fence();
      Wgmma<kTokens>::bf16(sum, a, tokens + r / 8, 1);
      wgmma_commit();
      wgmma_wait();
    }
    if (lane < 2) barrier_arrive_at(at.empty + turn.stage * 8, lane);
  }
}

// Both multiplying warpgroups, which have the halves of a head.
__device__ inline void both_sync() {
  asm volatile("bar.sync 5, 256;" ::: "memory");
}

// Norm and rotation of the queries or keys of kTokens tokens, on their way out in the buffers of both warpgroups.
// Sixteen lanes take a token. Angles come from the L2 and are fetched all at once, before they are needed.
template <int kTokens>
struct Turning {
  static constexpr int kEach = kTokens / (256 / kLanes);
  static_assert(kTokens % (256 / kLanes) == 0, "every thread has as many tokens");
  uint4 angles[kEach];

  __device__ static int first() { return threadIdx.x % 256 / kLanes; }

  __device__ void fetch(const Args& p, int token) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int position = (token + first() + i * (256 / kLanes)) % p.tokens_per_sample;
      angles[i] = angles_at(p.angles, p.first_position + position, threadIdx.x % kLanes);
    }
  }

  __device__ void turn(const Args& p, uint32_t buffers, const uint16_t* norm) const {
    const int part = threadIdx.x % kLanes;
    const Eight weight(*reinterpret_cast<const uint4*>(norm + part * 8));
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int t = first() + i * (256 / kLanes);
      const uint32_t at = buffers + part / 8 * (kTokens * kRows * 2) + t * 128 + ((part % 8 ^ t % 8) << 4);
      store_words(at, norm_and_rotate(load_words(at), weight, angles[i], p.eps));
    }
  }
};

// kTokens tokens from `token` on, of a warpgroup's panel; `sum` is where theirs begin. `buffers`: a box for each
// warpgroup.
template <int kTokens, bool kBfloat16>
__device__ void store_boxed(const CUtensorMap& out, const Args& p, uint32_t buffers, int group, int panel, int token,
                            const float* sum) {
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const uint32_t buffer = buffers + group * (kTokens * kRows * 2);
  const int head = panel / 2;
  if (thread == 0) store_wait_read();
  warpgroup_sync(group);
  // Lane l gives the address of row l % 8 of matrix l / 8: matrices are (tokens j, outputs low, high), then j + 1.
  const uint32_t chunk = warp * 2 + lane / 8 % 2;
  const uint32_t to = buffer + (lane / 16 * 8 + lane % 8) * 128 + ((chunk ^ (lane % 8)) << 4);
#pragma unroll
  for (int j = 0; j < kTokens / 8; j += 2) {
    const float* d = sum + 4 * j;
    store_matrices_transposed(to + j * 1024, pair<kBfloat16>(d[0], d[1]), pair<kBfloat16>(d[2], d[3]),
                              pair<kBfloat16>(d[4], d[5]), pair<kBfloat16>(d[6], d[7]));
  }
  if (head < 2 * p.heads) {
    Turning<kTokens> turning;
    turning.fetch(p, token);
    both_sync();
    turning.turn(p, buffers, head < p.heads ? p.norm_q : p.norm_k);
    fence_async_shared();
    both_sync();
  } else {
    fence_async_shared();
    warpgroup_sync(group);
  }
  if (thread == 0) {
    if (p.gate) {
      add_box(&out, buffer, panel * kRows, token);
    } else {
      store_box(&out, buffer, panel * kRows, token);
    }
    store_commit();
  }
}

template <int kTokens>
__device__ void store_plain(const Args& p, int panel, int token, const float (&sum)[kTokens / 2]) {
  const int thread = threadIdx.x % 128, lane = thread % 32;
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) {
    const int n = panel * kRows + thread / 32 * 16 + lane / 4 + (i & 2) * 4;
    const int m = token + i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (n >= p.n_valid || m >= p.m) continue;
    const int64_t at = int64_t{m} * p.n_valid + n;
    if (p.y_dtype == DType::fp32) {
      static_cast<float*>(p.y)[at] = sum[i];
    } else if (p.y_dtype == DType::bf16) {
      static_cast<__nv_bfloat16*>(p.y)[at] = __float2bfloat16_rn(sum[i]);
    } else {
      static_cast<__half*>(p.y)[at] = __float2half_rn(sum[i]);
    }
  }
}

// Sums of products become numbers: each has its token's scale.
template <int kTokens>
__device__ void scale_sums(const Args& p, int token, float (&sum)[kTokens / 2]) {
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
    const int m = token + j * 8 + threadIdx.x % 4 * 2;
    const float even = m < p.m ? p.act_scale[m] : 0.0f, odd = m + 1 < p.m ? p.act_scale[m + 1] : 0.0f;
    sum[4 * j] *= even * kCodeUnit;
    sum[4 * j + 1] *= odd * kCodeUnit;
    sum[4 * j + 2] *= even * kCodeUnit;
    sum[4 * j + 3] *= odd * kCodeUnit;
  }
}

// + bias of this thread's two rows, and what stands behind it.
template <int kTokens>
__device__ void finish_sums(const Args& p, float low, float high, float (&sum)[kTokens / 2]) {
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) sum[i] += i & 2 ? high : low;
  if (p.gelu) {
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) sum[i] = gelu(sum[i]);
  }
}

// sum *= the gates of this thread's rows n and n + 8: a tile's tokens are of one sample.
template <int kTokens>
__device__ void apply_gate(const Args& p, int n, int token, float (&sum)[kTokens / 2]) {
  const uint16_t* from = p.gate + token / p.tokens_per_sample * p.gate_stride + n;
  const auto gate = [&](int row) { return n + row < p.n_valid ? scale_value(from[row], DType::bf16) : 0.0f; };
  const float low = gate(0), high = gate(8);
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) sum[i] *= i & 2 ? high : low;
}

template <int kTokens>
__device__ void compute(const CUtensorMap& out, const Args& p, Stage<kTokens> at, int cluster, int clusters,
                        uint32_t rank_in_cluster, int group) {
  const int thread = threadIdx.x % 128, lane = thread % 32;
  Turn<Shape<kTokens>::kStages> turn;
  if (group == 1) give_turn(1);  // the first turn is the first warpgroup's
  for (int tile = cluster; tile < p.tiles; tile += clusters) {
    const int token = tile % p.token_tiles * kTokens;
    const int wanted = (tile / p.token_tiles * 2 + static_cast<int>(rank_in_cluster)) * 2 + group;
    const bool real = wanted < p.panels;
    const int panel = real ? wanted : 0;
    float sum[kTokens / 2];
    multiply<kTokens>(p, at, turn, group, tile + clusters >= p.tiles, sum);
    scale_sums<kTokens>(p, token, sum);
    if (p.rank) add_low_rank<kTokens>(p, at, turn, panel, sum);
    const int n = panel * kRows + thread / 32 * 16 + lane / 4;
    finish_sums<kTokens>(p, p.bias[n], p.bias[n + 8], sum);
    if (!real) continue;
    if (p.gate) apply_gate<kTokens>(p, n, token, sum);
    if (p.boxed && p.y_dtype == DType::bf16) {
      store_boxed<kTokens, true>(out, p, at.out, group, panel, token, sum);
    } else if (p.boxed) {
      store_boxed<kTokens, false>(out, p, at.out, group, panel, token, sum);
    } else {
      store_plain<kTokens>(p, panel, token, sum);
    }
  }
  if (thread == 0) store_wait_read();  // this shared memory may be another CTA's soon
}

// The ring's barriers, set up by one thread of each CTA before cluster_sync.
template <int kStages>
__device__ void begin_ring(uint32_t full, uint32_t empty) {
  for (int i = 0; i < kStages; ++i) {
    barrier_init(full + i * 8, 1);
    barrier_init(empty + i * 8, 16);  // every multiplying warp of both CTAs
  }
  fence_barrier_init();
}

template <int kTokens>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kThreads, 1)
    linear_fp8_kernel(const __grid_constant__ CUtensorMap act, const __grid_constant__ CUtensorMap low_rank,
                      const __grid_constant__ CUtensorMap out, const __grid_constant__ Args p) {
  extern __shared__ uint8_t memory[];
  const Stage<kTokens> at(shared_address(memory));
  const uint32_t rank_in_cluster = cluster_rank();
  const int cluster = blockIdx.x / 2, clusters = gridDim.x / 2;
  if (threadIdx.x == 0) {
    begin_ring<Shape<kTokens>::kStages>(at.full, at.empty);
    prefetch_map(&act);
  }
  cluster_sync();
  const int role = warpgroup();
  if (role == 0) {
    give_registers<40>();
    if (threadIdx.x == 0) fetch<kTokens>(act, low_rank, p, at, cluster, clusters, rank_in_cluster);
  } else {
    take_registers<232>();
    compute<kTokens>(out, p, at, cluster, clusters, rank_in_cluster, role - 1);
  }
  cluster_sync();  // no CTA may go while its partner still writes to its shared memory
}

}  // namespace nibble::sm90a
