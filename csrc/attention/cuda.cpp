// CUDA host side of the attention family, and its registration.
#include "attention/launch.h"
#include "attention/ops.h"

namespace mor {
namespace {

class Cuda {
 public:
  Cuda(const char* op, const Tensor& query) : check_(op), device_(query), query_(query) {
    constexpr int64_t kMaxRows = std::numeric_limits<int32_t>::max();
    check_.require(query.size(0) * query.size(1) <= kMaxRows, "query",
                   "of fewer than 2^31 rows of head_dim", shape_str(query));
  }

  // Kernels read 16 bytes at once.
  Tensor rows(const Tensor& tensor) const {
    constexpr int64_t kAlign = 16;
    const Tensor dense_rows = dense_inner(tensor, 1);
    bool aligned = reinterpret_cast<uintptr_t>(dense_rows.const_data_ptr()) % kAlign == 0;
    for (int64_t d = 0; d < tensor.dim() - 1; ++d) {
      const auto bytes = dense_rows.stride(d) * static_cast<int64_t>(tensor.element_size());
      aligned = aligned && (dense_rows.size(d) <= 1 || bytes % kAlign == 0);
    }
    return aligned ? dense_rows : torch::stable::clone(torch::stable::contiguous(dense_rows));
  }

  void attention(const AttentionParams& p) const { launched(cuda::attention(p, stream())); }

  void paged_attention(const AttentionParams& p) const {
    constexpr int64_t kMaxHeads = 65535;  // of a grid's second dimension
    check_.require(p.kv_heads <= kMaxHeads, "key_cache", "of at most 65535 KV heads", p.kv_heads);
    const Tensor scratch = new_tensor(query_, {cuda::paged_scratch(p)}, ScalarType::Float);
    launched(cuda::paged_attention(p, static_cast<float*>(scratch.mutable_data_ptr()), stream()));
  }

  void attention_bwd(const AttentionBwdParams& p) const {
    const Tensor row_states =
        new_tensor(query_, {query_.size(0), query_.size(1), 4}, ScalarType::Float);
    launched(cuda::attention_bwd(p, row_states.mutable_data_ptr(), stream()));
  }

 private:
  cudaStream_t stream() const { return static_cast<cudaStream_t>(device_.stream()); }
  void launched(cudaError_t error) const { check_.launched(error, cudaGetErrorString(error)); }

  Checks check_;
  OnDevice device_;
  Tensor query_;
};

}  // namespace
}  // namespace mor

MOR_LIBRARY_IMPL_CUDA(m) {
  using Ops = mor::AttentionOps<mor::Cuda>;
  m.impl("attention", TORCH_BOX(&Ops::attention));
  m.impl("paged_attention", TORCH_BOX(&Ops::paged_attention));
  m.impl("attention_bwd", TORCH_BOX(&Ops::attention_bwd));
}
