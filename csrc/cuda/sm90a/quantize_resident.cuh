// The pass of quantize.cuh for many tokens of one linear without a norm: CTAs stay, each with a slice of the inputs,
// and take one group of tokens after the other. Warp w works on inputs 128 w .. 128 w + 127 of the slice and keeps
// their part of `down` in registers; one warp more fetches the rows of the groups to come.
//
// A row's largest value and its projection need all CTAs of a cluster. Nobody waits for them: a CTA sends what it has
// of a group to the others, works on the next group, and then writes the codes of this one, whose news have come
// meanwhile. A number that is sent lands in the other CTA's shared memory and is counted there by a barrier ("met").
//
// Codes and scales have the bits of quantize.cuh's, and a sum the same bits in whichever group its token is.
#pragma once
#include "quantize.cuh"

namespace nibble::sm90a {

constexpr int kResidentTokens = 16, kResidentRanks = 32, kResidentSlice = 1536;  // at most
constexpr int kWorkers = 12, kRuns = 4;                                          // warps; their runs of 32 inputs
constexpr int kWorkerInputs = kRuns * 32, kResidentThreads = (kWorkers + 1) * 32;
constexpr int kMostClusters = 8;  // CTAs that share a row
// Groups in shared memory: one that waits for its scales, one that is worked on, one on its way.
constexpr int kBuffers = 3;
// A CTA that sends news of group n knows all to have sent those of n - 2, for which they had to be done with n - 4.
constexpr int kMeetings = 4;
constexpr int kSumPitch = kResidentRanks + 4;            // floats: eight ranks of four tokens then meet in no bank
constexpr int kResidentPitch = kResidentSlice * 2 + 64;  // bytes: nor do eight tokens

struct ResidentShared {
  uint8_t rows[kBuffers][kResidentTokens][kResidentPitch];
  float inv_smooth[kResidentSlice];
  float sums[2][kWorkers][kResidentTokens][kSumPitch];
  float of_warp[2][kWorkers][kResidentTokens];  // largest values
  // What the CTAs of the cluster send: largest values, and the sums of those tokens that this CTA finishes.
  float largest[kMeetings][kResidentTokens][kMostClusters];
  float projected[kMeetings][kResidentTokens * kResidentRanks];
  uint64_t arrived[kBuffers], read[kBuffers], met[kMeetings];
};
constexpr int kResidentBytes = sizeof(ResidentShared);
static_assert(kResidentBytes <= 227 * 1024, "a CTA has no more shared memory");

__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ inline void workers_sync() {
  asm volatile("bar.sync 1, 384;" ::: "memory");
}
static_assert(kWorkers * 32 == 384, "workers_sync counts them");

// Two numbers to this place in the shared memory of CTA `cta`, whose `barrier` counts eight bytes.
__device__ inline void send(const float* place, float2 v, const uint64_t* barrier, uint32_t cta) {
  asm volatile(
      "{\n.reg .b32 to, counted;\n"
      "mapa.shared::cluster.u32 to, %0, %4;\n"
      "mapa.shared::cluster.u32 counted, %3, %4;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [to], {%1, %2}, [counted];\n}" ::"r"(
          shared_address(place)),
      "f"(v.x), "f"(v.y), "r"(shared_address(barrier)), "r"(cta)
      : "memory");
}

__device__ inline void send(const float* place, float v, const uint64_t* barrier, uint32_t cta) {
  asm volatile(
      "{\n.reg .b32 to, counted;\n"
      "mapa.shared::cluster.u32 to, %0, %3;\n"
      "mapa.shared::cluster.u32 counted, %2, %3;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [to], %1, [counted];\n}" ::"r"(shared_address(place)),
      "f"(v), "r"(shared_address(barrier)), "r"(cta)
      : "memory");
}

struct Resident {
  const QuantizeFp8& p;
  ResidentShared& shared;
  int group_tokens, rounds, slice, first_input, clusters, rank, warp, lane;

  __device__ int first_token(int round) const {
    const int stride = static_cast<int>(gridDim.x) / clusters;
    return (static_cast<int>(blockIdx.x) / clusters + round * stride) * group_tokens;
  }
  __device__ int tokens(int round) const { return min(group_tokens, static_cast<int>(p.m) - first_token(round)); }
  __device__ bool branch() const { return p.target[0].rank != 0; }
};

// By a warp of its own.
__device__ inline void fetch_groups(const Resident& s) {
  for (int round = 0; round < s.rounds; ++round) {
    const int buffer = round % kBuffers, tokens = s.tokens(round), bytes = s.slice * 2;
    const uint32_t barrier = shared_address(&s.shared.arrived[buffer]);
    if (round >= kBuffers) barrier_wait(shared_address(&s.shared.read[buffer]), (round / kBuffers - 1) % 2);
    if (s.lane == 0) barrier_expect(barrier, tokens * bytes);
    __syncwarp();
    if (s.lane < tokens) {
      const int64_t from = int64_t{s.first_token(round) + s.lane} * s.p.x_stride + s.first_input;
      copy_bulk(shared_address(s.shared.rows[buffer][s.lane]), vector_at(s.p.x, from), bytes, barrier);
    }
  }
}

// A lane has the tokens row and row + 8 of a group, and eight inputs of each of its warp's runs: as the matrix units
// want them, so that what is read once serves the largest value and the projection.
struct Worker {
  int row, column, runs;
  uint4 down[kRuns][kResidentRanks / 8];

  __device__ explicit Worker(const Resident& s)
      : row(s.lane / 4),
        column(s.warp * kWorkerInputs + s.lane % 4 * 8),
        runs(min(max((s.slice - s.warp * kWorkerInputs) / 32, 0), kRuns)) {
    const int tiles = static_cast<int>(s.p.target[0].rank / 8);
    const auto* from = static_cast<const uint4*>(s.p.target[0].down) + s.lane;
    const int first_run = s.first_input / 32 + s.warp * kRuns;
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
#pragma unroll
      for (int tile = 0; tile < kResidentRanks / 8; ++tile) {
        const bool real = run < runs && tile < tiles;
        down[run][tile] = real ? from[(int64_t{first_run + run} * tiles + tile) * 32] : uint4{};
      }
    }
  }

  __device__ void smoothing(const Resident& s, int run, float (&by)[8]) const {
    const auto* from = reinterpret_cast<const float4*>(s.shared.inv_smooth + column + run * 32);
    const float4 a = from[0], b = from[1];
    by[0] = a.x, by[1] = a.y, by[2] = a.z, by[3] = a.w, by[4] = b.x, by[5] = b.y, by[6] = b.z, by[7] = b.w;
  }

  __device__ uint4 raw(const Resident& s, int buffer, int block, int run) const {
    return *reinterpret_cast<const uint4*>(s.shared.rows[buffer][block * 8 + row] + (column + run * 32) * 2);
  }
};

// A warp's part of a group: largest values of its inputs and their projection, for the CTA to read.
__device__ inline void look_at_group(const Resident& s, const Worker& mine, int round) {
  const int buffer = round % kBuffers;
  float largest[2] = {}, d[kResidentRanks / 16][2][4] = {};
#pragma unroll
  for (int run = 0; run < kRuns; ++run) {
    if (run >= mine.runs) break;
    float smoothed[8];
    mine.smoothing(s, run, smoothed);
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const uint4 raw = mine.raw(s, buffer, block, run);
      float v[8];
      unpack_eight(raw, v);
#pragma unroll
      for (int j = 0; j < 8; ++j) largest[block] = fmaxf(largest[block], fabsf(v[j] * smoothed[j]));
      if (!s.branch()) continue;
#pragma unroll
      for (int m = 0; m < kResidentRanks / 16; ++m) {
        multiply_16(d[m][block], mine.down[run][2 * m], raw.x, raw.y);
        multiply_16(d[m][block], mine.down[run][2 * m + 1], raw.z, raw.w);
      }
    }
  }
#pragma unroll
  for (int block = 0; block < 2; ++block) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      largest[block] = fmaxf(largest[block], __shfl_xor_sync(0xffffffffu, largest[block], step));
    }
    if (s.lane % 4 == 0) s.shared.of_warp[round % 2][s.warp][block * 8 + mine.row] = largest[block];
    if (!s.branch()) continue;
    auto& sums = s.shared.sums[round % 2][s.warp];
    const int token = block * 8 + s.lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < kResidentRanks / 16; ++m) {
      const int rank = m * 16 + mine.row;
      sums[token][rank] = d[m][block][0], sums[token + 1][rank] = d[m][block][1];
      sums[token][rank + 8] = d[m][block][2], sums[token + 1][rank + 8] = d[m][block][3];
    }
  }
}

// A CTA's part of a group to all CTAs (largest values), and to those that finish a token (its sums). Sums are added in
// the order of the warps.
__device__ inline void send_group(const Resident& s, int round) {
  const int meeting = round % kMeetings, kept = kResidentTokens / s.clusters;
  const uint64_t* met = &s.shared.met[meeting];
  if (threadIdx.x == 0) {
    const int sums = s.branch() ? kResidentRanks : 0;
    barrier_expect(shared_address(met), kResidentTokens * (s.clusters + sums) * 4);
  }
  const int thread = static_cast<int>(threadIdx.x);
  constexpr int kSenders = kResidentTokens * kMostClusters;  // whole warps
  if (thread < kSenders) {
    const int t = thread / kMostClusters, cta = thread % kMostClusters;
    float largest = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWorkers; ++warp) largest = fmaxf(largest, s.shared.of_warp[round % 2][warp][t]);
    if (cta < s.clusters) send(&s.shared.largest[meeting][t][s.rank], largest, met, cta);
  } else if (s.branch()) {
    const int t = (thread - kSenders) / (kResidentRanks / 2), rank = (thread - kSenders) % (kResidentRanks / 2) * 2;
    float2 sum{};
#pragma unroll
    for (int warp = 0; warp < kWorkers; ++warp) {
      const float2 part = *reinterpret_cast<const float2*>(&s.shared.sums[round % 2][warp][t][rank]);
      sum.x += part.x, sum.y += part.y;
    }
    const int place = (s.rank * kept + t / s.clusters) * kResidentRanks + rank;
    send(&s.shared.projected[meeting][place], sum, met, t % s.clusters);
  }
}
static_assert(kResidentTokens * (kMostClusters + kResidentRanks / 2) == kWorkers * 32, "a thread each");

// What makes codes of a token's smoothed values, and its scale.
__device__ inline float choose_scale(const Resident& s, int meeting, int t, float& scale) {
  const auto* from = reinterpret_cast<const float4*>(s.shared.largest[meeting][t]);
  const float4 a = from[0], b = from[1];
  const float largest = fmaxf(fmaxf(fmaxf(a.x, a.y), fmaxf(a.z, a.w)), fmaxf(fmaxf(b.x, b.y), fmaxf(b.z, b.w)));
  const bool nothing = largest < kTinyMax;
  scale = nothing ? 0.0f : largest * (1.0f / kLargestE4m3);
  return nothing ? 0.0f : kLargestE4m3 / largest;
}

__device__ inline void write_group(const Resident& s, const Worker& mine, int round) {
  const QuantizeTarget& to = s.p.target[0];
  const int tokens = s.tokens(round), first = s.first_token(round);
  float by[2];
#pragma unroll
  for (int block = 0; block < 2; ++block) {
    const int t = block * 8 + mine.row;
    float scale;
    by[block] = choose_scale(s, round % kMeetings, t, scale);
    if (s.rank == 0 && s.warp == 0 && s.lane % 4 == 0 && t < tokens) to.scales[first + t] = scale;
  }
#pragma unroll
  for (int run = 0; run < kRuns; ++run) {
    if (run >= mine.runs) break;
    float smoothed[8];
    mine.smoothing(s, run, smoothed);
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const int t = block * 8 + mine.row;
      float v[8];
      unpack_eight(mine.raw(s, round % kBuffers, block, run), v);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] *= smoothed[j];
      const int64_t place = int64_t{first + t} * s.p.k + s.first_input + mine.column + run * 32;
      if (t < tokens) {
        *reinterpret_cast<uint2*>(to.codes + place) = {four_codes(v, by[block]), four_codes(v + 4, by[block])};
      }
    }
  }
}

// The projections of this CTA's tokens of a group, added in the order of the CTAs.
__device__ inline void finish_group(const Resident& s, int round) {
  const QuantizeTarget& to = s.p.target[0];
  const int kept = kResidentTokens / s.clusters, tokens = s.tokens(round);
  for (int i = threadIdx.x; i < kept * kResidentRanks && to.rank; i += kWorkers * 32) {
    const int t = i / kResidentRanks * s.clusters + s.rank, rank = i % kResidentRanks;
    if (t >= tokens || rank >= to.rank) continue;
    const float* from = s.shared.projected[round % kMeetings] + i;
    float sum = 0.0f;
    for (int cta = 0; cta < s.clusters; ++cta) sum += from[cta * kept * kResidentRanks];
    const int64_t token = s.first_token(round) + t;
    static_cast<__nv_bfloat16*>(to.low_rank)[token * to.rank + rank] = __float2bfloat16_rn(sum);
  }
}

// A group whose news were sent a round ago.
__device__ inline void end_group(const Resident& s, const Worker& mine, int round) {
  barrier_wait(shared_address(&s.shared.met[round % kMeetings]), round / kMeetings % 2);
  write_group(s, mine, round);
  __syncwarp();
  if (s.lane == 0) barrier_arrive(shared_address(&s.shared.read[round % kBuffers]));
  finish_group(s, round);
}

__device__ inline void begin_resident(const Resident& s) {
  if (threadIdx.x == 0) {
    for (uint64_t& barrier : s.shared.arrived) barrier_init(shared_address(&barrier), 1);
    for (uint64_t& barrier : s.shared.read) barrier_init(shared_address(&barrier), kWorkers);
    for (uint64_t& barrier : s.shared.met) barrier_init(shared_address(&barrier), 1);
    fence_barrier_init();
  }
  const float* inv = s.p.target[0].inv_smooth;
  for (int i = threadIdx.x; i < s.slice; i += kResidentThreads) {
    s.shared.inv_smooth[i] = inv ? inv[s.first_input + i] : 1.0f;
  }
  float* largest = &s.shared.largest[0][0][0];  // nobody sends for CTAs that are not there
  for (int i = threadIdx.x; i < kMeetings * kResidentTokens * kMostClusters; i += kResidentThreads) largest[i] = 0.0f;
  __syncthreads();
  cluster_arrive();
}

__global__ void __launch_bounds__(kResidentThreads, 1)
    quantize_resident_kernel(const __grid_constant__ QuantizeFp8 p, int group_tokens) {
  extern __shared__ __align__(128) uint8_t memory[];
  uint32_t clusters;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(clusters));
  const int rank = static_cast<int>(cluster_rank()), slice = static_cast<int>(p.k / clusters);
  const int groups = (static_cast<int>(p.m) + group_tokens - 1) / group_tokens;
  const int cluster = static_cast<int>(blockIdx.x / clusters), stride = static_cast<int>(gridDim.x / clusters);
  const Resident s{p,
                   *reinterpret_cast<ResidentShared*>(memory),
                   group_tokens,
                   (groups - cluster + stride - 1) / stride,
                   slice,
                   rank * slice,
                   static_cast<int>(clusters),
                   rank,
                   warp_in_block(),
                   static_cast<int>(threadIdx.x % 32)};
  begin_resident(s);
  if (s.warp == kWorkers) {
    fetch_groups(s);
    cluster_wait();
    return;
  }
  const Worker mine(s);
  cluster_wait();  // their barriers are there
  for (int round = 0; round < s.rounds; ++round) {
    barrier_wait(shared_address(&s.shared.arrived[round % kBuffers]), round / kBuffers % 2);
    look_at_group(s, mine, round);
    workers_sync();
    send_group(s, round);
    if (round) end_group(s, mine, round - 1);
  }
  // A CTA that has all of the last news is sent nothing more, so it may go.
  end_group(s, mine, s.rounds - 1);
}

}  // namespace nibble::sm90a
