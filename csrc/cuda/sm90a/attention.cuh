// Attention of Hopper with 8-bit probabilities and values: softmax(q k^T / sqrt(128)) v for heads of 128. Scores come
// from 16-bit queries and keys (in e4m3 they cost pictures 3 dB); what is multiplied with the values is e4m3.
//
// A CTA takes 64 queries of one head for each multiplying warpgroup; keys and values come through a ring of tiles of
// 128. The product of the next tile's scores runs while the last tile's values are summed, and one warpgroup's
// exponentials run while another multiplies. Values lie transposed (d x keys), their keys in the order in which a
// thread holds its scores, so that probabilities become the A operand without any exchange between threads.
#pragma once
#include "../kernels.h"
#include "pairs.cuh"
#include "ptx.cuh"
#include "wgmma.cuh"

namespace nibble::sm90a {

constexpr int kHead = 128;  // elements of a head
constexpr int kKeys = 128;  // keys of a tile
constexpr int kHalf = 64;   // elements in a row of 128 bytes: queries and keys lie as two halves
constexpr int kQueryHalf = 64 * 128, kKeyHalf = kKeys * 128;  // bytes, of a warpgroup and of a tile
constexpr int kKeyBytes = 2 * kKeyHalf, kValueBytes = kHead * kKeys;
constexpr int kTiles = 4;              // in the ring, keys and values each
constexpr int kStrands = 4;            // of a row, in a thread
constexpr float kProbabilityBits = 8;  // probabilities are held as 2^8 p: e4m3 then reaches down to 2^-17

template <int kGroups>
struct AttentionShape {
  static constexpr int kQueries = 64 * kGroups;
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kQueryBytes = kGroups * 2 * kQueryHalf;
  static constexpr int kShared = kQueryBytes + kTiles * (kKeyBytes + kValueBytes) + (4 * kTiles + 1) * 8 + 1024;
};

struct AttentionArgs {
  int tokens, tiles;  // of the sequence; of keys
  int heads;
  float scale;      // log2(e) / sqrt(128)
  float out_scale;  // undoes what v is scaled by
};

template <int kGroups>
struct AttentionRing {
  uint32_t query, keys, values, keys_full, keys_empty, values_full, values_empty, query_full;
  __device__ explicit AttentionRing(uint32_t base) {
    query = (base + 1023) & ~1023u;  // queries first, results later: as many bytes
    keys = query + AttentionShape<kGroups>::kQueryBytes;
    values = keys + kTiles * kKeyBytes;
    keys_full = values + kTiles * kValueBytes;
    keys_empty = keys_full + kTiles * 8;
    values_full = keys_empty + kTiles * 8;
    values_empty = values_full + kTiles * 8;
    query_full = values_empty + kTiles * 8;
  }
};

__device__ inline float exp2_fast(float v) {
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(v));
  return e;
}

template <int kGroups>
__device__ void attention_fetch(const CUtensorMap& q, const CUtensorMap& k, const CUtensorMap& v,
                                const AttentionArgs& p, AttentionRing<kGroups> at, int first, int plane) {
  const int column = plane % p.heads * kHead, batch = plane / p.heads;
  barrier_expect(at.query_full, AttentionShape<kGroups>::kQueryBytes);
  for (int i = 0; i < 2 * kGroups; ++i) {
    copy_box(at.query + i * kQueryHalf, &q, column + i % 2 * kHalf, first + i / 2 * 64, batch, at.query_full);
  }
  for (int tile = 0; tile < p.tiles; ++tile) {
    const int stage = tile % kTiles;
    const uint32_t free = tile / kTiles % 2 ^ 1, keys = at.keys + stage * kKeyBytes, full = at.keys_full + stage * 8;
    barrier_wait(at.keys_empty + stage * 8, free);
    barrier_expect(full, kKeyBytes);
    for (int half = 0; half < 2; ++half) {
      copy_box(keys + half * kKeyHalf, &k, column + half * kHalf, tile * kKeys, batch, full);
    }
    barrier_wait(at.values_empty + stage * 8, free);
    barrier_expect(at.values_full + stage * 8, kValueBytes);
    copy_box(at.values + stage * kValueBytes, &v, tile * kKeys, 0, plane, at.values_full + stage * 8);
  }
}

// One row of scores in a thread: two of them, 32 elements each (see wgmma's D).
struct Rows {
  float largest[2], total[2];
};

// The largest of a row, over the four threads that hold it.
__device__ inline float over_quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
  return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}

// Scores -> 2^(score - largest), in place; returns what earlier results must be multiplied with.
__device__ inline void soften(float (&s)[64], Rows& rows, float (&rescale)[2], float scale) {
  // In strands of a row, so that few numbers wait for one another.
  float most[2][kStrands], sum[2][kStrands] = {}, largest[2];
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    float& kept = most[i / 2 % 2][i / 4 % kStrands];
    kept = i < 4 * kStrands && i % 2 == 0 ? s[i] : fmaxf(kept, s[i]);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    largest[r] = rows.largest[r];
#pragma unroll
    for (int run = 0; run < kStrands; ++run) largest[r] = fmaxf(largest[r], most[r][run]);
    largest[r] = over_quad_max(largest[r]);
    rescale[r] = exp2_fast((rows.largest[r] - largest[r]) * scale);
    rows.largest[r] = largest[r];
    rows.total[r] *= rescale[r];
  }
  const float shift[2] = {kProbabilityBits - largest[0] * scale, kProbabilityBits - largest[1] * scale};
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    s[i] = exp2_fast(fmaf(s[i], scale, shift[i / 2 % 2]));
    sum[i / 2 % 2][i / 4 % kStrands] += s[i];
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int run = 0; run < kStrands; ++run) rows.total[r] += sum[r][run];
  }
}

// Keys past the end count for nothing.
__device__ inline void mask(float (&s)[64], int left, int lane) {
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    if (i / 4 * 8 + lane % 4 * 2 + i % 2 >= left) s[i] = -INFINITY;
  }
}

__device__ inline void pack_scores(const float (&s)[64], uint32_t (&a)[16]) {
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const float* d = s + 16 * t;
    a[4 * t] = pack_e4m3(d[0], d[1], d[4], d[5]);
    a[4 * t + 1] = pack_e4m3(d[2], d[3], d[6], d[7]);
    a[4 * t + 2] = pack_e4m3(d[8], d[9], d[12], d[13]);
    a[4 * t + 3] = pack_e4m3(d[10], d[11], d[14], d[15]);
  }
}

__device__ inline void start_scores(float (&s)[64], uint64_t query, uint64_t keys) {
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < 8; ++i) {  // 16 elements each
    Wgmma<128>::bf16(s, query + i / 4 * (kQueryHalf >> 4) + i % 4 * 2, keys + i / 4 * (kKeyHalf >> 4) + i % 4 * 2,
                     i > 0);
  }
  wgmma_commit();
}

__device__ inline void start_values(float (&o)[64], uint32_t (&p)[16], uint64_t values, int add) {
#pragma unroll
  for (int i = 0; i < 16; ++i) asm volatile("" : "+r"(p[i])::"memory");
  wgmma_fence();
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    uint32_t a[4] = {p[4 * t], p[4 * t + 1], p[4 * t + 2], p[4 * t + 3]};
    Wgmma<128>::e4m3(o, a, values + 2 * t, t > 0 || add);
  }
  wgmma_commit();
}

// A barrier of one warpgroup; constants, since otherwise all sixteen would be set aside.
__device__ inline void group_sync(int group) {
  if (group == 0) {
    asm volatile("bar.sync 4, 128;" ::: "memory");
  } else if (group == 1) {
    asm volatile("bar.sync 5, 128;" ::: "memory");
  } else {
    asm volatile("bar.sync 6, 128;" ::: "memory");
  }
}

// The two warpgroups take turns at issuing products, so that one's exponentials run while the other's products do.
__device__ inline void wait_for_turn(int group) {
  if (group == 0) {
    asm volatile("bar.sync 1, 256;" ::: "memory");
  } else {
    asm volatile("bar.sync 2, 256;" ::: "memory");
  }
}

__device__ inline void give_turn(int group) {
  if (group == 0) {
    asm volatile("bar.arrive 2, 256;" ::: "memory");
  } else {
    asm volatile("bar.arrive 1, 256;" ::: "memory");
  }
}

template <int kGroups>
__device__ void attention_multiply(const CUtensorMap& out, const AttentionArgs& p, AttentionRing<kGroups> at, int first,
                                   int head, int group) {
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  float s[64], o[64];
  uint32_t probabilities[16];
  Rows rows{{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
  float rescale[2];
#pragma unroll
  for (int i = 0; i < 64; ++i) s[i] = o[i] = 0.0f;
  const uint64_t query = operand_descriptor(at.query + group * 2 * kQueryHalf);
  if (group == 1) give_turn(1);
  barrier_wait(at.query_full, 0);
  barrier_wait(at.keys_full, 0);
  wait_for_turn(group);
  start_scores(s, query, operand_descriptor(at.keys));
  if (group == 0 || p.tiles > 1) give_turn(group);
  wgmma_wait<0>();
  if (lane == 0) barrier_arrive(at.keys_empty);
  if (p.tokens < kKeys) mask(s, p.tokens, lane);
  soften(s, rows, rescale, p.scale);
  pack_scores(s, probabilities);
  for (int tile = 1; tile < p.tiles; ++tile) {
    const int stage = tile % kTiles, last = (tile - 1) % kTiles;
    barrier_wait(at.keys_full + stage * 8, tile / kTiles % 2);
    wait_for_turn(group);
    start_scores(s, query, operand_descriptor(at.keys + stage * kKeyBytes));
    barrier_wait(at.values_full + last * 8, (tile - 1) / kTiles % 2);
    start_values(o, probabilities, operand_descriptor(at.values + last * kValueBytes), tile > 1);
    if (group == 0 || tile + 1 < p.tiles) give_turn(group);
    wgmma_wait<1>();
    if (lane == 0) barrier_arrive(at.keys_empty + stage * 8);
    if (p.tokens - tile * kKeys < kKeys) mask(s, p.tokens - tile * kKeys, lane);
    soften(s, rows, rescale, p.scale);
    wgmma_wait<0>();
    if (lane == 0) barrier_arrive(at.values_empty + last * 8);
    if (__any_sync(0xffffffffu, rescale[0] != 1.0f || rescale[1] != 1.0f)) {  // as a rule a maximum stays
#pragma unroll
      for (int i = 0; i < 64; ++i) o[i] *= rescale[i / 2 % 2];
    }
    pack_scores(s, probabilities);
  }
  const int last = (p.tiles - 1) % kTiles;
  barrier_wait(at.values_full + last * 8, (p.tiles - 1) / kTiles % 2);
  start_values(o, probabilities, operand_descriptor(at.values + last * kValueBytes), p.tiles > 1);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    rows.total[r] += __shfl_xor_sync(0xffffffffu, rows.total[r], 1);
    rows.total[r] += __shfl_xor_sync(0xffffffffu, rows.total[r], 2);
    rescale[r] = p.out_scale / rows.total[r];
  }
  wgmma_wait<0>();
  // Results take the place of this group's queries: 64 rows of 128 elements as two boxes of 64 columns, swizzled.
  const uint32_t buffer = at.query + group * 2 * kQueryHalf;
  group_sync(group);
  const uint32_t row = warp * 16 + lane % 16;
#pragma unroll
  for (int j = 0; j < 16; j += 2) {  // eight columns each: matrices (rows 0-7, 8-15) of column block j, then of j + 1
    const int block = j + lane / 16;
    const uint32_t to = buffer + block / 8 * kQueryHalf + row * 128 + ((block % 8 ^ row % 8) << 4);
    const float* d = o + 4 * j;
    const auto two = [&](int i, int r) { return pack_two(d[i] * rescale[r], d[i + 1] * rescale[r]); };
    store_matrices(to, two(0, 0), two(2, 1), two(4, 0), two(6, 1));
  }
  fence_async_shared();
  group_sync(group);
  if (thread == 0) {
    store_box(&out, buffer, head % p.heads * kHead, first + group * 64, head / p.heads);
    store_box(&out, buffer + kQueryHalf, head % p.heads * kHead + kHalf, first + group * 64, head / p.heads);
    store_commit();
    store_wait_read();
  }
}

template <int kGroups>
__global__ void __launch_bounds__(AttentionShape<kGroups>::kThreads, 1)
    attention_kernel(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
                     const __grid_constant__ CUtensorMap v, const __grid_constant__ CUtensorMap out,
                     const __grid_constant__ AttentionArgs p) {
  extern __shared__ uint8_t memory[];
  const AttentionRing<kGroups> at(shared_address(memory));
  if (threadIdx.x == 0) {
    for (int i = 0; i < kTiles; ++i) {
      barrier_init(at.keys_full + i * 8, 1);
      barrier_init(at.values_full + i * 8, 1);
      barrier_init(at.keys_empty + i * 8, 4 * kGroups);
      barrier_init(at.values_empty + i * 8, 4 * kGroups);
    }
    barrier_init(at.query_full, 1);
    fence_barrier_init();
  }
  __syncthreads();
  const int first = blockIdx.x * AttentionShape<kGroups>::kQueries, head = blockIdx.y;
  const int role = warpgroup();
  if (role == 0) {
    give_registers<24>();
    if (threadIdx.x == 0) attention_fetch<kGroups>(q, k, v, p, at, first, head);
  } else {
    take_registers<240>();
    attention_multiply<kGroups>(out, p, at, first, head, role - 1);
  }
}

}  // namespace nibble::sm90a
