// What the short and the long version of route_topk share on the host side.
#pragma once

#include "route/launch.h"
#include "route/select.cuh"

namespace mor::cuda {

// The longest sequence that one block holds.
inline constexpr int kLongestShort = 16384;

// For any mixture of lengths, with scratch.
cudaError_t route_topk_long(const RouteTopkParams& p, cudaStream_t stream);

}  // namespace mor::cuda
