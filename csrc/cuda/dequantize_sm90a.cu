// Dense weights from INT4 codes for sm_90a (H100, H200).
#include "common/dequantize.cuh"

namespace nibble {

Status dequantize_int4_sm90a(const DequantizeInt4& p, void* stream) {
  return dequantize_int4(p, stream);
}

}  // namespace nibble
