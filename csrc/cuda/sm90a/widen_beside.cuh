// Weights made 8-bit beside the product that multiplies them: the bytes of widen.cuh, but no pass before. The three
// warps of linear_wide_kernel that have nothing else to do write them, in the order in which the first round of tiles
// asks for them; what fetches waits for those of its panels only, a few inputs at a time.
//
// Warps draw their units by a counter. So whoever runs gets all of them done, and a CTA that the device has no place
// for yet keeps nobody waiting.
//
// Weights go to the L2 by ordinary stores and come back by the copy engine, on another multiprocessor. Between the two
// stand, in this order: a proxy fence of every thread that wrote, the warp's barrier, a fence and an addition at device
// scope; a load that acquires, a proxy fence, the copy. One proxy fence would do, two cost nothing here.
#pragma once
#include "widen.cuh"

namespace nibble::sm90a {

// Bytes of `from` by the four low digits of `choices`: no masks, which __byte_perm has.
__device__ inline uint32_t permute(uint2 from, uint32_t choices) {
  uint32_t chosen;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(chosen) : "r"(from.x), "r"(from.y), "r"(choices));
  return chosen;
}

// Of a word of eight codes (engine/ops/wgmma64.py draws it), in e4m3: `first` those of its first step, `second` those
// of the other. Magnitudes lie there as a byte permutation wants its choices; the signs are put on after it.
__device__ inline void choose_eight(uint32_t word, uint2 from, uint32_t& first, uint32_t& second) {
  const uint32_t near = word & 0x77777777u;
  const uint2 pairs = {permute(from, near), permute(from, near >> 16)};
  first = permute(pairs, 0x6420) ^ (word & 0x80808080u);
  second = permute(pairs, 0x7531) ^ (__funnelshift_r(word, word, 4) & 0x80808080u);
}

// A warp's work from one counter to the next: a quarter of a panel, 16 rows, and kUnitSteps steps of inputs. All units
// of as many panels as the first round of tiles needs come first, and of those the first inputs.
struct Unit {
  int panel, quarter, part;

  __device__ Unit(const Args& p, int unit) {
    const int parts = unit_parts(p.steps), from = unit / (p.first_panels * 4 * parts) * p.first_panels;
    const int quarters = min(p.first_panels, p.panels - from) * 4, rest = unit - from * 4 * parts;
    panel = from + rest % quarters / 4, quarter = rest % 4, part = rest / quarters;
  }

  __device__ int64_t block(const Args& p, int i) const { return int64_t{panel} * p.steps + part * kUnitSteps + i; }

  __device__ int count(const Args& p) const { return min(kUnitSteps, p.steps - part * kUnitSteps); }
};

__device__ inline int units(const Args& p) {
  return p.panels * 4 * unit_parts(p.steps);
}

// A lane's codes of a step, in rows low and low + 8. Of four lanes, each has the scale of one row and half.
struct Codes {
  uint4 half[2];
  uint16_t scale;

  __device__ void load(const Args& p, int64_t block, int quarter) {
    const int lane = threadIdx.x % 32;
    const uint8_t* from = p.codes + block * kCodeBytes + (quarter * 32 + lane) * 16;
    half[0] = *reinterpret_cast<const uint4*>(from);
    half[1] = *reinterpret_cast<const uint4*>(from + kCodeBytes / 2);
    scale = p.wscales[(block * 2 + lane % 4 / 2) * kRows + quarter * 16 + lane / 4 + lane % 2 * 8];
  }
};

// A step of a unit. `unit` belongs to the row whose scale the lane has; `to` is where its row `low` begins.
__device__ inline void convert(const Codes& from, float unit, DType dtype, uint8_t* to) {
  const int lane = threadIdx.x % 32;
  const uint2 table = magnitudes<false>(unit * scale_value(from.scale, dtype));
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4 codes = from.half[half];
    const uint32_t words[2][2] = {{codes.x, codes.z}, {codes.y, codes.w}};
    const int chunk = half * 4 + lane % 4;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const uint2 shared = {__shfl_sync(0xffffffffu, table.x, half * 2 + row, 4),
                            __shfl_sync(0xffffffffu, table.y, half * 2 + row, 4)};
      uint32_t mine[4];  // in the order of their chunks of 16 inputs; a lane has four inputs of each
      choose_eight(words[row][0], shared, mine[0], mine[2]);
      choose_eight(words[row][1], shared, mine[1], mine[3]);
      uint8_t* row_at = to + row * 8 * kInputs;
      *reinterpret_cast<uint4*>(row_at + ((chunk ^ lane / 4) << 4)) = gather_four(mine, lane % 4);
    }
  }
}

// All of a unit's codes are asked for before any is converted.
__device__ inline void widen_unit(const Args& p, Unit at) {
  const int lane = threadIdx.x % 32, low = at.quarter * 16 + lane / 4, count = at.count(p);
  const float unit = row_unit(p.row_most[at.panel * kRows + low + lane % 2 * 8]);
  Codes codes[kUnitSteps];
#pragma unroll
  for (int i = 0; i < kUnitSteps; ++i) {
    if (i < count) codes[i].load(p, at.block(p, i), at.quarter);
  }
#pragma unroll
  for (int i = 0; i < kUnitSteps; ++i) {
    if (i < count) convert(codes[i], unit, p.scale_dtype, p.wide + at.block(p, i) * kWideBytes + low * kInputs);
  }
}

// Two panels of a CTA share a counter, which ends at eight: quarters of both.
__device__ inline uint32_t* counter(const Args& p, int panel, int part) {
  return p.ready + panel / 2 * unit_parts(p.steps) + part;
}

__device__ inline void announce(const Args& p, Unit at) {
  fence_async_global();
  __syncwarp();
  fence_device();
  if (threadIdx.x % 32 == 0) add_relaxed(counter(p, at.panel, at.part), 1);
}

// Lane 0 draws, the others get it by same_in_warp, later.
__device__ inline int draw(const Args& p) {
  return threadIdx.x % 32 == 0 ? static_cast<int>(atomicAdd(p.drawn, 1u)) : 0;
}

// A warp's share. The next number is on its way while this unit's bytes are.
__device__ inline void widen_beside(const Args& p) {
  int unit = same_in_warp(draw(p));
  while (unit < units(p)) {
    const Unit at(p, unit);
    widen_unit(p, at);
    const int next = draw(p);
    announce(p, at);
    unit = same_in_warp(next);
  }
}

// Before the counters may be read: what a first round of all warps reads comes to the L2, whoever draws it.
__device__ inline void prefetch_unit(const Args& p, int unit) {
  const int lane = threadIdx.x % 32, i = lane / 2, half = lane % 2;
  if (unit >= units(p)) return;
  const Unit at(p, unit);
  if (i >= at.count(p)) return;
  const int64_t block = at.block(p, i);
  prefetch_bulk(p.codes + block * kCodeBytes + half * (kCodeBytes / 2) + at.quarter * 512, 512);
  prefetch_bulk(p.wscales + (block * 2 + half) * kRows + at.quarter * 16, 32);
}

// Until the copy engine may read inputs `part` of panels `panel` and `panel` + 1. One thread.
__device__ inline void wait_until_wide(const Args& p, int panel, int part) {
  const uint32_t* ready = counter(p, panel, part);
  while (load_acquire(ready) < 8) {
  }
  fence_async_global();
}

}  // namespace nibble::sm90a
