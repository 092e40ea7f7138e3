// The CUDA kernels of the kv_cache family, for its host side.
#pragma once

#include <cuda_runtime_api.h>

#include "kv_cache/params.h"

namespace mor::cuda {

cudaError_t rotary(const RotaryParams&, cudaStream_t);
cudaError_t kv_append(const KvAppendParams&, cudaStream_t);
cudaError_t rotary_kv_append(const RotaryKvAppendParams&, cudaStream_t);

}  // namespace mor::cuda
