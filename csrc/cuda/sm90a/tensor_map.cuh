// Descriptions of tensors for the bulk copy engine. Boxes are 128 bytes wide and swizzled by 128 bytes.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace nibble::sm90a {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function, looked up at run time: the module must load where there is no driver.
inline Encode encode() {
  static const Encode found = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(entry) : nullptr;
  }();
  return found;
}

// A tensor of `rank` dimensions, the innermost first and dense, the others `strides` bytes apart, in boxes; what lies
// outside reads as zero.
inline bool make_map(CUtensorMap* map, CUtensorMapDataType type, const void* data, int rank, const cuuint64_t* sizes,
                     const cuuint64_t* strides, const cuuint32_t* boxes) {
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  return encode()(map, type, static_cast<cuuint32_t>(rank), const_cast<void*>(data), sizes, strides, boxes, steps,
                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// The same, all of it dense.
inline bool make_map(CUtensorMap* map, CUtensorMapDataType type, int bytes, const void* data, int rank,
                     const cuuint64_t* sizes, const cuuint32_t* boxes) {
  cuuint64_t strides[4], step = static_cast<cuuint64_t>(bytes);
  for (int i = 0; i + 1 < rank; ++i) strides[i] = step *= sizes[i];
  return make_map(map, type, data, rank, sizes, strides, boxes);
}

inline bool map_3d(CUtensorMap* map, CUtensorMapDataType type, int bytes, const void* data, int64_t x, int64_t y,
                   int64_t z, int box_x, int box_y) {
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(x), static_cast<cuuint64_t>(y), static_cast<cuuint64_t>(z)};
  const cuuint32_t boxes[3] = {static_cast<cuuint32_t>(box_x), static_cast<cuuint32_t>(box_y), 1};
  return make_map(map, type, bytes, data, 3, sizes, boxes);
}

inline bool map_bytes(CUtensorMap* map, const void* data, int64_t x, int64_t y, int64_t z, int box_x, int box_y) {
  return map_3d(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, data, x, y, z, box_x, box_y);
}

inline bool map_bfloat16(CUtensorMap* map, const void* data, int64_t x, int64_t y, int64_t z, int box_x, int box_y) {
  return map_3d(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, data, x, y, z, box_x, box_y);
}

}  // namespace nibble::sm90a
