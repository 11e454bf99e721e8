// Python's view of the CPU kernels: addresses and sizes in, None or a sentence out. All checks are Python's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "kernels.h"

namespace py = pybind11;
using namespace nibble;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Sizes of a packed linear and where its parts lie in its one buffer: codes, scales, up, down, inv_smooth, bias.
struct Panels {
  int64_t n, k, rank;
  int scale_dtype, low_rank_dtype;
  std::array<int64_t, 6> offsets;

  Weight weight(Address buffer) const {
    auto part = [&](int i) { return buffer + static_cast<Address>(offsets[static_cast<size_t>(i)]); };
    return {at<const uint8_t>(part(0)),
            at<const uint16_t>(part(1)),
            at<const uint16_t>(part(2)),
            at<const uint16_t>(part(3)),
            at<const float>(part(4)),
            at<const float>(part(5)),
            n,
            k,
            rank,
            DType(scale_dtype),
            DType(low_rank_dtype)};
  }
  int64_t scale_bytes(int64_t m, int mode) const { return m * (ActMode(mode) == ActMode::int8 ? 1 : k / kGroup) * 4; }
};

Status quantize_act(int isa, const Panels& panels, Address buffer, Address x, int x_dtype, int64_t x_stride, int64_t m,
                    int mode, Address codes, Address scales, Address low_rank, int threads) {
  const Weight w = panels.weight(buffer);
  const QuantizeAct p{&w,
                      at<const void>(x),
                      m,
                      x_stride,
                      DType(x_dtype),
                      ActMode(mode),
                      at<int8_t>(codes),
                      at<float>(scales),
                      at<float>(low_rank)};
  return run_quantize_act(isa_table()[isa], p, threads);
}

Status linear(int isa, const Panels& panels, Address buffer, Address codes, Address scales, Address low_rank, int64_t m,
              int mode, Address y, int y_dtype, Address scratch, int64_t scratch_bytes, int threads) {
  const Weight w = panels.weight(buffer);
  const Linear p{
      &w,          at<const int8_t>(codes), at<const float>(scales), at<const float>(low_rank), m, ActMode(mode),
      at<void>(y), DType(y_dtype)};
  return run_linear(isa_table()[isa], p, threads, at<uint8_t>(scratch), scratch_bytes);
}

int64_t linear_scratch(int isa, const Panels& panels, int64_t m, int threads) {
  return threads * isa_table()[isa].kernels.scratch_bytes(panels.weight(0), m);
}

// Both ops in one call; the scratch memory holds the quantized tokens first.
int64_t svdq_linear_scratch(int isa, const Panels& panels, int64_t m, int mode, int threads) {
  return m * (panels.k + panels.rank * 4) + panels.scale_bytes(m, mode) + linear_scratch(isa, panels, m, threads);
}

Status svdq_linear(int isa, const Panels& panels, Address buffer, Address x, int x_dtype, int64_t x_stride, int64_t m,
                   int mode, Address y, int y_dtype, Address scratch, int64_t scratch_bytes, int threads) {
  const Weight w = panels.weight(buffer);
  int8_t* codes = at<int8_t>(scratch);
  float* scales = reinterpret_cast<float*>(codes + m * w.k);
  float* low_rank = scales + panels.scale_bytes(m, mode) / 4;
  uint8_t* rest = reinterpret_cast<uint8_t*>(low_rank + m * w.rank);
  const int64_t left = scratch_bytes - (rest - at<uint8_t>(scratch));
  const QuantizeAct tokens{&w, at<const void>(x), m, x_stride, DType(x_dtype), ActMode(mode), codes, scales, low_rank};
  const Linear p{&w, codes, scales, low_rank, m, ActMode(mode), at<void>(y), DType(y_dtype)};
  return run_svdq_linear(isa_table()[isa], tokens, p, threads, rest, left);
}

Status awq_linear(int isa, int64_t n, int64_t k, int scale_dtype, Address buffer, std::array<int64_t, 4> offsets,
                  Address x, int64_t x_stride, int64_t m, Address y, int y_dtype, int threads) {
  auto part = [&](size_t i) { return buffer + static_cast<Address>(offsets[i]); };
  const AwqLinear p{at<const uint8_t>(part(0)),
                    at<const uint16_t>(part(1)),
                    at<const uint16_t>(part(2)),
                    at<const float>(part(3)),
                    n,
                    k,
                    DType(scale_dtype),
                    at<const float>(x),
                    m,
                    x_stride,
                    at<void>(y),
                    DType(y_dtype)};
  return run_awq_linear(isa_table()[isa], p, threads);
}

std::vector<std::tuple<const char*, bool, const char*>> instruction_sets() {
  std::vector<std::tuple<const char*, bool, const char*>> sets;
  for (int i = 0; i < kIsaCount; ++i)
    sets.emplace_back(isa_table()[i].kernels.name, isa_table()[i].runs, isa_table()[i].why);
  return sets;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of the 4-bit engine; called by engine.ops alone";
  py::class_<Panels>(m, "Panels")
      .def(py::init([](int64_t n, int64_t k, int64_t rank, int scales, int low_rank, std::array<int64_t, 6> offsets) {
        return Panels{n, k, rank, scales, low_rank, offsets};
      }));
  using Release = py::call_guard<py::gil_scoped_release>;
  m.def("instruction_sets", &instruction_sets);
  m.def("quantize_act", &quantize_act, Release());
  m.def("linear", &linear, Release());
  m.def("linear_scratch", &linear_scratch);
  m.def("svdq_linear", &svdq_linear, Release());
  m.def("svdq_linear_scratch", &svdq_linear_scratch);
  m.def("awq_linear", &awq_linear, Release());
}
