// What the host hands to the kernels of the compact family, the same on every device.
#pragma once

#include "common/types.h"

namespace mor {

struct GatherTokensParams {
  const void* x;         // [num_rows, row_size], rows row_stride elements apart
  const int32_t* index;  // [count], -1 gives a zero row
  void* out;             // [count, row_size]
  int64_t count, row_size, row_stride;
  int64_t element_bytes;
};

}  // namespace mor
