// Dense weights from INT4 codes for sm_120a (RTX 50).
#include "common/dequantize.cuh"

namespace nibble {

Status dequantize_int4_sm120a(const DequantizeInt4& p, void* stream) {
  return dequantize_int4(p, stream);
}

}  // namespace nibble
