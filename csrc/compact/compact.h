// Argument checks of the compact family, shared by all devices.
#pragma once

#include "common/cpu_isa.h"
#include "compact/params.h"
#include "torch_abi.h"

namespace mor {

MOR_DECLARE_CPU_KERNEL(gather_tokens, GatherTokensParams)

}  // namespace mor
