// Python's view of the CUDA kernels: addresses, sizes and a stream in, None or a sentence out. Loads without a driver.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

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

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of the 4-bit engine; called by engine.ops alone";
  m.def("device_count", &device_count);
  m.def("dequantize_int4_sm80", &dequantize<dequantize_int4_sm80>);
  m.def("dequantize_int4_sm90a", &dequantize<dequantize_int4_sm90a>);
  m.def("dequantize_int4_sm120a", &dequantize<dequantize_int4_sm120a>);
}
