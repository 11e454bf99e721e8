// Python's view of the CUDA kernels: addresses, sizes and a stream in, None or a sentence out. Loads without a driver.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <utility>
#include <vector>

#include "kernels.h"

namespace py = pybind11;
using namespace nibble;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

using Dequantize = Status (*)(const DequantizeInt4&, void* stream);

template <Dequantize run>
Status dequantize(uintptr_t codes, uintptr_t scales, uintptr_t out, int64_t n, int64_t k, int dtype, uintptr_t stream) {
  return run({at<const uint8_t>(codes), at<const uint16_t>(scales), at<uint16_t>(out), n, k, DType(dtype)},
             at<void>(stream));
}

// Addresses and sizes come as tuples in the order of the struct's members: fewer arguments, the same cost. A gate: its
// address, the stride of its rows, tokens for each of them. Heads: addresses of angles, norm_q and norm_k, how many
// heads, tokens of a sample, the first one's position; then epsilon.
using Gate = std::optional<std::array<int64_t, 3>>;
using Heads = std::optional<std::pair<std::array<int64_t, 6>, float>>;

Status linear_fp8(const std::array<uintptr_t, 10>& a, const std::array<int64_t, 6>& sizes, int scale_dtype, int y_dtype,
                  bool gelu, int tile, const Gate& gate, const Heads& heads, uintptr_t stream) {
  LinearFp8 p{};
  p.codes = at<const uint8_t>(a[0]), p.wscales = at<const uint16_t>(a[1]), p.row_most = at<const float>(a[2]);
  p.up = at<const uint16_t>(a[3]), p.bias = at<const float>(a[4]);
  p.act = at<const uint8_t>(a[5]), p.act_scale = at<const float>(a[6]), p.low_rank = at<const uint16_t>(a[7]);
  p.y = at<void>(a[8]), p.wide = at<const uint8_t>(a[9]);
  p.m = sizes[0], p.n = sizes[1], p.k = sizes[2], p.n_valid = sizes[3], p.k_valid = sizes[4], p.rank = sizes[5];
  p.scale_dtype = DType(scale_dtype), p.y_dtype = DType(y_dtype), p.gelu = gelu, p.tile = tile;
  p.tokens_per_sample = p.m;
  if (gate) p.gate = at<const uint16_t>((*gate)[0]), p.gate_stride = (*gate)[1], p.tokens_per_sample = (*gate)[2];
  if (heads) {
    const auto& [parts, eps] = *heads;
    p.angles = at<const void>(parts[0]), p.norm_q = at<const uint16_t>(parts[1]),
    p.norm_k = at<const uint16_t>(parts[2]);
    p.heads = static_cast<int>(parts[3]), p.tokens_per_sample = parts[4], p.first_position = static_cast<int>(parts[5]);
    p.eps = eps;
  }
  return linear_fp8_sm90a(p, at<void>(stream));
}

// Addresses and sizes in the order of the struct's members.
Status widen_fp8(const std::array<uintptr_t, 6>& a, const std::array<int64_t, 3>& sizes, int scale_dtype, bool nvfp4,
                 uintptr_t stream) {
  return widen_fp8_sm90a(
      {at<const uint8_t>(a[0]), at<const void>(a[1]), at<const float>(a[2]), at<const uint16_t>(a[3]),
       at<const float>(a[4]), at<uint8_t>(a[5]), sizes[0], sizes[1], sizes[2], DType(scale_dtype), nvfp4},
      at<void>(stream));
}

Status gated_add(const std::array<uintptr_t, 5>& a, const std::array<int64_t, 4>& sizes, uintptr_t stream) {
  return gated_add_sm80({at<const void>(a[0]), at<const void>(a[1]), at<const void>(a[2]), at<const void>(a[3]),
                         at<void>(a[4]), sizes[0], sizes[1], sizes[2], sizes[3]},
                        at<void>(stream));
}

// A target: addresses of inv_smooth, down, codes, scales, low_rank; its rank. A norm: addresses of scale and shift, the
// stride of their rows, samples; the last argument is its epsilon.
using Target = std::pair<std::array<uintptr_t, 5>, int64_t>;
using Norm = std::optional<std::array<int64_t, 4>>;

Status quantize_fp8(uintptr_t x, int64_t m, int64_t k, int64_t x_stride, const std::vector<Target>& targets,
                    const Norm& norm, float eps, uintptr_t stream, int form) {
  QuantizeFp8 p{};
  p.form = QuantizeForm(form);
  p.x = at<const void>(x), p.m = m, p.k = k, p.x_stride = x_stride;
  p.samples = 1, p.tokens_per_sample = m;
  if (norm) {
    p.scale = at<const void>((*norm)[0]), p.shift = at<const void>((*norm)[1]);
    p.mod_stride = (*norm)[2], p.samples = static_cast<int>((*norm)[3]), p.tokens_per_sample = m / p.samples;
    p.eps = eps;
  }
  if (targets.empty() || targets.size() > 2) return "one or two linears can read the same tokens";
  for (const auto& [address, rank] : targets) {
    p.target[p.targets++] = {at<const float>(address[0]), at<const void>(address[1]), at<uint8_t>(address[2]),
                             at<float>(address[3]),       at<void>(address[4]),       rank};
  }
  return quantize_fp8_sm90a(p, at<void>(stream));
}

// A layer in panel16 tiles: addresses of codes, scales, up, down, inv_smooth, bias; then n, k, rank; then the types of
// scales and low-rank factors.
using Parts = std::array<uintptr_t, 6>;
using Sizes = std::array<int64_t, 5>;

Weight weight(const Parts& at_, const Sizes& sizes) {
  return {at<const uint8_t>(at_[0]),
          at<const uint16_t>(at_[1]),
          at<const uint16_t>(at_[2]),
          at<const uint16_t>(at_[3]),
          at<const float>(at_[4]),
          at<const float>(at_[5]),
          sizes[0],
          sizes[1],
          sizes[2],
          DType(sizes[3]),
          DType(sizes[4])};
}

Status quantize_act(const Parts& parts, const Sizes& sizes, uintptr_t x, int x_dtype, int64_t x_stride, int64_t m,
                    int mode, bool pairs, const std::array<uintptr_t, 3>& made, uintptr_t stream) {
  const Weight w = weight(parts, sizes);
  return quantize_act_sm80({&w, at<const void>(x), m, x_stride, DType(x_dtype), ActMode(mode), at<int8_t>(made[0]),
                            at<float>(made[1]), at<float>(made[2])},
                           pairs, at<void>(stream));
}

// a: addresses of codes, scales, low_rank, y; gate as of linear_fp8.
Status linear(const Parts& parts, const Sizes& sizes, const std::array<uintptr_t, 4>& a, int64_t m, int mode,
              bool pairs, int y_dtype, bool gelu, const Gate& gate, int form, uintptr_t stream) {
  const Weight w = weight(parts, sizes);
  LinearSm80 p{};
  p.of = {&w, at<const int8_t>(a[0]), at<const float>(a[1]), at<const float>(a[2]),
          m,  ActMode(mode),          at<void>(a[3]),        DType(y_dtype)};
  p.pairs = pairs, p.gelu = gelu, p.form = ProductForm(form), p.tokens_per_sample = m;
  if (gate) p.gate = at<const uint16_t>((*gate)[0]), p.gate_stride = (*gate)[1], p.tokens_per_sample = (*gate)[2];
  return linear_sm80(p, at<void>(stream));
}

// parts: codes, scales, zeros, bias; sizes: n, k, type of scales and zeros.
Status awq_linear(const std::array<uintptr_t, 4>& parts, const std::array<int64_t, 3>& sizes, uintptr_t x,
                  int64_t x_stride, int64_t m, uintptr_t y, int y_dtype, uintptr_t stream) {
  return awq_linear_sm80({at<const uint8_t>(parts[0]), at<const uint16_t>(parts[1]), at<const uint16_t>(parts[2]),
                          at<const float>(parts[3]), sizes[0], sizes[1], DType(sizes[2]), at<const float>(x), m,
                          x_stride, at<void>(y), DType(y_dtype)},
                         at<void>(stream));
}

// A layer: addresses of codes, scales, zeros, bias and y; then n and the type of scales and zeros. sizes: k, rows of x
// and their stride. More layers than a launch holds take more launches.
Status awq_linears(const std::vector<std::array<int64_t, 7>>& layers, const std::array<int64_t, 3>& sizes, uintptr_t x,
                   int y_dtype, uintptr_t stream) {
  AwqLinears p{at<const float>(x), sizes[1], sizes[2], sizes[0], DType(y_dtype), 0, {}};
  int panels = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    const auto& [codes, scales, zeros, bias, y, n, scale_dtype] = layers[i];
    const auto behind = [from = codes](int64_t part) { return static_cast<uint32_t>(part - from); };
    p.layer[p.layers++] = {at<const uint8_t>(codes), at<void>(y), behind(scales),    behind(zeros), behind(bias),
                           static_cast<int>(n),      panels,      DType(scale_dtype)};
    panels += static_cast<int>((n + kPanel - 1) / kPanel);
    if (p.layers < kMostLayers && i + 1 < layers.size()) continue;
    if (const Status status = awq_linears_sm80(p, at<void>(stream))) return status;
    p.layers = panels = 0;
  }
  return nullptr;
}

// A layer of NVFP4 weights: addresses of codes, scales, up, down, inv_smooth, bias, factor; n, k, rank, the type of its
// low-rank factors.
using PartsFp4 = std::array<uintptr_t, 7>;
using SizesFp4 = std::array<int64_t, 4>;

WeightFp4 weight_fp4(const PartsFp4& a, const SizesFp4& sizes) {
  return {at<const uint8_t>(a[0]),
          at<const uint8_t>(a[1]),
          at<const uint16_t>(a[2]),
          at<const uint16_t>(a[3]),
          at<const float>(a[4]),
          at<const float>(a[5]),
          at<const float>(a[6]),
          sizes[0],
          sizes[1],
          sizes[2],
          DType(sizes[3])};
}

// counts: tokens, and strides of the rows of x and of scales.
Status quantize_act_fp4(const PartsFp4& parts, const SizesFp4& sizes, uintptr_t x, const std::array<int64_t, 3>& counts,
                        uintptr_t codes, uintptr_t scales, uintptr_t low_rank, uintptr_t stream) {
  const WeightFp4 w = weight_fp4(parts, sizes);
  return quantize_act_sm120a({&w, at<const void>(x), counts[0], counts[1], counts[2], at<uint8_t>(codes),
                              at<uint8_t>(scales), at<float>(low_rank)},
                             at<void>(stream));
}

// counts: tokens, and the stride of the rows of scales.
Status linear_fp4(const PartsFp4& parts, const SizesFp4& sizes, uintptr_t codes, uintptr_t scales, uintptr_t low_rank,
                  const std::array<int64_t, 2>& counts, uintptr_t y, int y_dtype, bool gelu, uintptr_t stream) {
  const WeightFp4 w = weight_fp4(parts, sizes);
  return linear_sm120a({&w, at<const uint8_t>(codes), at<const uint8_t>(scales), at<const float>(low_rank), counts[0],
                        counts[1], at<void>(y), DType(y_dtype), gelu},
                       at<void>(stream));
}

// Addresses in the order of the struct's members; sizes: batch, heads, tokens, text tokens.
Status rotate_heads(const std::array<uintptr_t, 10>& a, const std::array<int, 4>& sizes, float eps, uintptr_t stream) {
  const int64_t stride = int64_t{3} * sizes[1] * 128;
  return rotate_heads_sm80(
      {at<const void>(a[0]), at<const void>(a[1]), at<const void>(a[2]), at<const void>(a[3]), at<const void>(a[4]),
       at<const void>(a[5]), at<const void>(a[6]), at<void>(a[7]), at<void>(a[8]), at<void>(a[9]), stride, stride,
       sizes[0], sizes[1], sizes[2], sizes[3], eps},
      at<void>(stream));
}

// Addresses of q, k, v, values, out; strides of tokens and samples of q, k, v; sizes: batch, heads, tokens.
Status attention(const std::array<uintptr_t, 5>& a, const std::array<int64_t, 6>& strides,
                 const std::array<int64_t, 3>& sizes, float scale, float v_scale, uintptr_t stream) {
  const auto view = [&](int i) { return HeadsView{at<const void>(a[i]), strides[2 * i], strides[2 * i + 1]}; };
  return attention_sm90a(
      {view(0), view(1), view(2), at<uint8_t>(a[3]), at<void>(a[4]), sizes[0], sizes[1], sizes[2], scale, v_scale},
      at<void>(stream));
}

// Addresses in the order of the struct's members; sizes: batch, height, width, channels, padded.
Status depthwise_glu(const std::array<uintptr_t, 4>& a, const std::array<int, 5>& sizes, uintptr_t stream) {
  return depthwise_glu_sm80({at<const void>(a[0]), at<const void>(a[1]), at<const void>(a[2]), at<void>(a[3]), sizes[0],
                             sizes[1], sizes[2], sizes[3], sizes[4]},
                            at<void>(stream));
}

// The same; sizes: tokens, run, batch, heads.
Status linear_attention(const std::array<uintptr_t, 3>& a, const std::array<int64_t, 4>& sizes, float epsilon,
                        uintptr_t stream) {
  return linear_attention_sm80({at<const void>(a[0]), at<float>(a[1]), at<void>(a[2]), sizes[0], sizes[1],
                                static_cast<int>(sizes[2]), static_cast<int>(sizes[3]), epsilon},
                               at<void>(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of the 4-bit engine; called by engine.ops alone";
  m.def("device_count", &device_count);
  m.def("dequantize_int4_sm80", &dequantize<dequantize_int4_sm80>);
  m.def("dequantize_int4_sm90a", &dequantize<dequantize_int4_sm90a>);
  m.def("dequantize_int4_sm120a", &dequantize<dequantize_int4_sm120a>);
  m.def("quantize_act_sm80", &quantize_act);
  m.def("linear_sm80", &linear);
  m.def("awq_linear_sm80", &awq_linear);
  m.def("awq_linears_sm80", &awq_linears);
  m.def("rotate_heads_sm80", &rotate_heads);
  m.def("gated_add_sm80", &gated_add);
  m.def("depthwise_glu_sm80", &depthwise_glu);
  m.def("linear_attention_sm80", &linear_attention);
  m.def("quantize_act_sm120a", &quantize_act_fp4);
  m.def("linear_sm120a", &linear_fp4);
  m.def("widen_fp8_sm90a", &widen_fp8);
  m.def("linear_fp8_sm90a", &linear_fp8);
  m.def("quantize_fp8_sm90a", &quantize_fp8);
  m.def("attention_sm90a", &attention);
}
