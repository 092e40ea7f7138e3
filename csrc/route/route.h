// Kernels of the route family.
#pragma once

#include "common/cpu_isa.h"
#include "route/params.h"

namespace mor {

MOR_DECLARE_CPU_KERNEL(route_topk, RouteTopkParams)
MOR_DECLARE_CPU_KERNEL(route_depth, RouteDepthParams)

}  // namespace mor
