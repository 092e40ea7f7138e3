// From the dtype of the data to the kernels compiled for it.
#include "attention/launch.h"
#include "attention/split.cuh"
#include "common/launch.cuh"

namespace mor::cuda {

cudaError_t attention(const AttentionParams& p, cudaStream_t stream) {
  return dispatch_data_dtype(p.dtype, [&]<typename T>() { return attention_of<T>(p, stream); });
}

cudaError_t paged_attention(const AttentionParams& params, float* scratch, cudaStream_t stream) {
  const PagedParams p{params, results_in(scratch, params)};
  return dispatch_data_dtype(p.dtype,
                             [&]<typename T>() { return paged_attention_of<T>(p, stream); });
}

int64_t paged_scratch(const AttentionParams& p) {
  constexpr int64_t kStateFloats = sizeof(RowState) / sizeof(float);
  return p.kv_heads * results_in(nullptr, p).head_stride * (p.head_dim + kStateFloats);
}

cudaError_t attention_bwd(const AttentionBwdParams& p, void* row_states, cudaStream_t stream) {
  return dispatch_data_dtype(
      p.forward.dtype, [&]<typename T>() { return attention_bwd_of<T>(p, row_states, stream); });
}

}  // namespace mor::cuda
