// Dense weights from INT4 codes for sm_80, and through PTX whatever has no file of its own.
#include "common/dequantize.cuh"

namespace nibble {

Status dequantize_int4_sm80(const DequantizeInt4& p, void* stream) {
  return dequantize_int4(p, stream);
}

}  // namespace nibble
