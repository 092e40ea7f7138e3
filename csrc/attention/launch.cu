// From the dtype of the data to the kernels compiled for it.
#include "attention/launch.h"
#include "common/launch.cuh"

namespace mor::cuda {

cudaError_t attention(const AttentionParams& p, cudaStream_t stream) {
  return dispatch_data_dtype(p.dtype, [&]<typename T>() { return attention_of<T>(p, stream); });
}

}  // namespace mor::cuda
