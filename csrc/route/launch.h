// CUDA entry points of the route family.
#pragma once

#include <cuda_runtime_api.h>

#include "route/params.h"

namespace mor::cuda {

// A multiple of 4; 0 where one block can hold every sequence.
int64_t route_topk_scratch_bytes(const RouteTopkParams& p);

cudaError_t route_topk(const RouteTopkParams& p, cudaStream_t stream);
cudaError_t route_depth(const RouteDepthParams& p, cudaStream_t stream);

}  // namespace mor::cuda
