// Kernels of the compact family, and the argument checks that its ops share on all devices.
#pragma once

#include "common/cpu_isa.h"
#include "compact/params.h"
#include "torch_abi.h"

namespace mor {

MOR_DECLARE_CPU_KERNEL(compact_depth, CompactDepthParams)
MOR_DECLARE_CPU_KERNEL(gather_tokens, GatherTokensParams)
MOR_DECLARE_CPU_KERNEL(gather_tokens_bwd, GatherTokensBwdParams)
MOR_DECLARE_CPU_KERNEL(scatter_tokens, ScatterTokensParams)
MOR_DECLARE_CPU_KERNEL(scatter_tokens_, ScatterTokensInplaceParams)
MOR_DECLARE_CPU_KERNEL(scatter_tokens_bwd, ScatterTokensBwdParams)
MOR_DECLARE_CPU_KERNEL(gather_rms_norm, GatherRmsNormParams)
MOR_DECLARE_CPU_KERNEL(gather_rms_norm_bwd, GatherRmsNormBwdParams)

// Rows are named by int32.
inline constexpr int64_t kMaxRows = std::numeric_limits<int32_t>::max();

// Far above any model; keeps a wrong number from asking for all memory.
inline constexpr int64_t kMaxRecursions = 1024;

inline void check_rows(const Checks& check, const char* argument, const Tensor& x) {
  check.floating(argument, x);
  check.require(x.dim() >= 1, argument, "of shape [N, ...]", shape_str(x));
  check.require(x.size(0) <= kMaxRows, argument, "of fewer than 2^31 rows", x.size(0));
}

// tensor is [count, ...] with the dtype and the row shape of x.
inline void check_rows_like(const Checks& check, const char* argument, const Tensor& tensor,
                            int64_t count, const Tensor& x) {
  check.same_device(argument, tensor, x);
  check.dtype(argument, tensor, x.scalar_type());
  bool ok = tensor.dim() == x.dim() && tensor.size(0) == count;
  for (int64_t d = 1; ok && d < x.dim(); ++d) {
    ok = tensor.size(d) == x.size(d);
  }
  if (!ok) {
    std::string rule = str("of shape [", count);
    for (int64_t d = 1; d < x.dim(); ++d) {
      rule += str(", ", x.size(d));
    }
    check.fail(argument, rule + "]", shape_str(tensor));
  }
}

inline int64_t row_size_of(const Tensor& x) {
  int64_t size = 1;
  for (int64_t d = 1; d < x.dim(); ++d) {
    size *= x.size(d);
  }
  return size;
}

inline Tensor new_rows_like(const Tensor& x, int64_t count) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes[0] = count;
  return new_tensor(x, sizes);
}

}  // namespace mor
