// What the host hands to the kernels of the route family, the same on every device.
#pragma once

#include "common/types.h"

namespace mor {

struct RouteTopkParams {
  const void* scores;             // [rows]
  const int32_t* cu_seqlens;      // [batch + 1]
  const int32_t* cu_seqlens_out;  // [batch + 1]
  void* scratch;                  // CPU: of the size of scores; CUDA: route_topk_scratch_bytes()
  int32_t* index;                 // [total_out]
  int64_t rows, batch, total_out;
  int64_t max_seqlen;  // at most rows
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
