// What the host hands to the kernels of the route family, the same on every device.
#pragma once

#include "common/types.h"

namespace mor {

struct RouteTopkParams {
  const void* scores;             // [rows]
  const int32_t* cu_seqlens;      // [batch + 1]
  const int32_t* cu_seqlens_out;  // [batch + 1]
  void* keys;                     // [rows], scratch of the size of scores
  int32_t* index;                 // [cu_seqlens_out[batch]]
  int64_t rows, batch;
  DType dtype;
};

struct RouteDepthParams {
  const void* logits;  // [rows, recursions]
  const void* bias;    // [recursions] of the accumulate type, or null
  int32_t* depth;      // [rows]
  int32_t* load;       // [recursions]
  int64_t rows, recursions;
  DType dtype;
};

}  // namespace mor
