// The CUDA kernels of the compact family, as cuda.cpp calls them.
#pragma once

#include <cuda_runtime_api.h>

#include "compact/params.h"

namespace mor::cuda {

int64_t compact_depth_scratch_bytes(const CompactDepthParams& p);
cudaError_t compact_depth(const CompactDepthParams& p, cudaStream_t stream);

cudaError_t gather_tokens(const GatherTokensParams& p, cudaStream_t stream);
cudaError_t gather_tokens_bwd(const GatherTokensBwdParams& p, cudaStream_t stream);
cudaError_t scatter_tokens(const ScatterTokensParams& p, cudaStream_t stream);
cudaError_t scatter_tokens_(const ScatterTokensInplaceParams& p, cudaStream_t stream);
cudaError_t scatter_tokens_bwd(const ScatterTokensBwdParams& p, cudaStream_t stream);

cudaError_t gather_rms_norm(const GatherRmsNormParams& p, cudaStream_t stream);
// Some for every multiprocessor of the current device.
int64_t gather_rms_norm_bwd_blocks(const GatherRmsNormBwdParams& p);
cudaError_t gather_rms_norm_bwd(const GatherRmsNormBwdParams& p, cudaStream_t stream);

// Steps of the above. invert_index: see InverseIndex. map_sources: first[row] is an entry that
// names the row, any of them; where none does it stays what it was. So nothing needs to be cleared
// first, and whoever reads it looks whether index[first[row]] is the row.
cudaError_t invert_index(const InverseIndex& inverse, cudaStream_t stream);
cudaError_t map_sources(const InverseIndex& inverse, cudaStream_t stream);

}  // namespace mor::cuda
