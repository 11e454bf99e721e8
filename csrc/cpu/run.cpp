// Splits an op among threads. Each element of a result is computed by one thread in one order, so the number of threads
// never changes a bit of it.
#include "common.h"
#include "kernels.h"

namespace nibble {
namespace {

constexpr double kWorkPerThread = 1 << 20;  // multiply-adds below which another thread costs more than it brings

int useful_threads(int threads, double work) {
  const double most = work / kWorkPerThread + 1.0;
  return threads < most ? threads : static_cast<int>(most);
}

// Cuts rows x panels into a grid of at most `threads` parts: the one whose parts take least. Parts that share panels
// prepare these twice, parts that share rows prepare those twice (which costs about as much as a panel).
struct Grid {
  int64_t row_parts, panel_parts;
};
Grid choose_grid(const Kernels& kernels, int64_t rows, int64_t panels, int threads) {
  Grid best{1, 1};
  int64_t least = INT64_MAX;
  for (int64_t row_parts = min64(threads, ceil_div(rows, kernels.row_tile)); row_parts >= 1; --row_parts) {
    const int64_t panel_parts = min64(threads / row_parts, panels), part_rows = ceil_div(rows, row_parts);
    const int64_t cost = ceil_div(panels, panel_parts) * (part_rows + kernels.panel_cost) + part_rows;
    if (cost < least) {
      least = cost;
      best = {row_parts, panel_parts};
    }
  }
  return best;
}

struct LinearJob {
  const Isa* isa;
  const Linear* p;
  const QuantizeAct* tokens;  // to be quantized first, by the part that multiplies them; or null
  Grid grid;
  uint8_t* scratch;
};

void linear_part(void* context, int64_t part) {
  const LinearJob& job = *static_cast<const LinearJob*>(context);
  const int64_t i = part / job.grid.panel_parts, j = part % job.grid.panel_parts;
  const int64_t m = job.p->m, panels = ceil_div(job.p->w->n, kPanel);
  const Range rows{m * i / job.grid.row_parts, m * (i + 1) / job.grid.row_parts};
  const Range columns{panels * j / job.grid.panel_parts, panels * (j + 1) / job.grid.panel_parts};
  uint8_t* scratch = job.scratch + part * job.isa->kernels.scratch_bytes(*job.p->w, m);
  if (job.tokens) job.isa->kernels.quantize_act(*job.tokens, rows);
  job.isa->kernels.linear(*job.p, rows, columns, scratch);
}

LinearJob plan(const Isa& isa, const Linear& p, int threads, uint8_t* scratch) {
  const double work = static_cast<double>(p.m) * static_cast<double>(p.w->k * p.w->n);
  const Grid grid = choose_grid(isa.kernels, p.m, ceil_div(p.w->n, kPanel), useful_threads(threads, work));
  return {&isa, &p, nullptr, grid, scratch};
}

void run(LinearJob job, int threads) {
  parallel_for(threads, job.grid.row_parts * job.grid.panel_parts, linear_part, &job);
}

template <class Params>
struct SplitJob {
  const Isa* isa;
  const Params* p;
  int64_t total, parts;
  Range range(int64_t part) const { return {total * part / parts, total * (part + 1) / parts}; }
};

void quantize_part(void* context, int64_t part) {
  const auto& job = *static_cast<const SplitJob<QuantizeAct>*>(context);
  job.isa->kernels.quantize_act(*job.p, job.range(part));
}

void awq_part(void* context, int64_t part) {
  const auto& job = *static_cast<const SplitJob<AwqLinear>*>(context);
  job.isa->kernels.awq_linear(*job.p, job.range(part));
}

}  // namespace

Status run_quantize_act(const Isa& isa, const QuantizeAct& p, int threads) {
  if (!isa.runs) return isa.why;
  const double work = static_cast<double>(p.m) * static_cast<double>(p.w->k * (p.w->rank + 32));
  SplitJob<QuantizeAct> job{&isa, &p, p.m, min64(useful_threads(threads, work), p.m)};
  parallel_for(threads, job.parts, quantize_part, &job);
  return nullptr;
}

Status run_linear(const Isa& isa, const Linear& p, int threads, uint8_t* scratch, int64_t scratch_bytes) {
  if (!isa.runs) return isa.why;
  if (scratch_bytes < threads * isa.kernels.scratch_bytes(*p.w, p.m)) return "the scratch memory is too small";
  run(plan(isa, p, threads, scratch), threads);
  return nullptr;
}

Status run_svdq_linear(const Isa& isa, const QuantizeAct& tokens, const Linear& p, int threads, uint8_t* scratch,
                       int64_t scratch_bytes) {
  if (!isa.runs) return isa.why;
  LinearJob job = plan(isa, p, threads, scratch);
  if (job.grid.panel_parts > 1) {  // parts share tokens
    run_quantize_act(isa, tokens, threads);
    return run_linear(isa, p, threads, scratch, scratch_bytes);
  }
  if (scratch_bytes < threads * isa.kernels.scratch_bytes(*p.w, p.m)) return "the scratch memory is too small";
  job.tokens = &tokens;  // one round of threads instead of two, and the codes are still in their caches
  run(job, threads);
  return nullptr;
}

Status run_awq_linear(const Isa& isa, const AwqLinear& p, int threads) {
  if (!isa.runs) return isa.why;
  const double work = static_cast<double>(p.m) * static_cast<double>(p.k * p.n);
  const int64_t panels = ceil_div(p.n, kPanel);
  SplitJob<AwqLinear> job{&isa, &p, panels, min64(useful_threads(threads, work), panels)};
  parallel_for(threads, job.parts, awq_part, &job);
  return nullptr;
}

}  // namespace nibble
