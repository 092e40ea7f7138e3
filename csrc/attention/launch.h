// The CUDA kernels of the attention family, for its host side. Rows of all tensors are 16-byte
// aligned.
#pragma once

#include <cuda_runtime_api.h>

#include "attention/params.h"

namespace mor::cuda {

cudaError_t attention(const AttentionParams& params, cudaStream_t stream);

// scratch: paged_scratch(params) floats.
cudaError_t paged_attention(const AttentionParams& params, float* scratch, cudaStream_t stream);
int64_t paged_scratch(const AttentionParams& params);
// row_states: 16 bytes of scratch memory a row of head_dim of the query.
cudaError_t attention_bwd(const AttentionBwdParams& params, void* row_states, cudaStream_t stream);

// The same for one dtype: compiled in files of their own.
template <typename T>
cudaError_t attention_of(const AttentionParams& params, cudaStream_t stream);
struct PagedParams;
template <typename T>
cudaError_t paged_attention_of(const PagedParams& params, cudaStream_t stream);
template <typename T>
cudaError_t attention_bwd_of(const AttentionBwdParams& params, void* row_states,
                             cudaStream_t stream);

}  // namespace mor::cuda
