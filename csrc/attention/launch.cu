// From the dtype of the data to the kernels compiled for it.
#include "attention/launch.h"
#include "common/launch.cuh"

namespace mor::cuda {

cudaError_t attention(const AttentionParams& p, cudaStream_t stream) {
  return dispatch_data_dtype(p.dtype, [&]<typename T>() { return attention_of<T>(p, stream); });
}

cudaError_t attention_bwd(const AttentionBwdParams& p, void* row_states, cudaStream_t stream) {
  return dispatch_data_dtype(
      p.forward.dtype, [&]<typename T>() { return attention_bwd_of<T>(p, row_states, stream); });
}

}  // namespace mor::cuda
