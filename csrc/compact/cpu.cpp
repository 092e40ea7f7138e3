// CPU host side of the compact family: checks, allocation, registration.
#include "compact/compact.h"

namespace mor {
namespace {

Tensor gather_tokens(const Tensor& x, const Tensor& index) {
  const Checks check("gather_tokens");
  check.require(x.dim() >= 1, "x", "of shape [N, ...]", shape_str(x));
  check.floating("x", x);
  check.int32_vector("index", index, -1, "[K]");
  const Tensor rows = dense_inner(x, x.dim() - 1);
  const Tensor dense_index = dense(index);
  const auto* index_ptr = dense_index.const_data_ptr<int32_t>();
  check.within("index", index_ptr, index.numel(), -1, x.size(0));

  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes[0] = index.numel();
  Tensor out = new_tensor(x, sizes);
  int64_t row_size = 1;
  for (int64_t d = 1; d < x.dim(); ++d) {
    row_size *= x.size(d);
  }
  cpu::gather_tokens({.x = rows.const_data_ptr(),
                      .index = index_ptr,
                      .out = out.mutable_data_ptr(),
                      .count = index.numel(),
                      .row_size = row_size,
                      .row_stride = rows.stride(0),
                      .element_bytes = static_cast<int64_t>(x.element_size())});
  return out;
}

}  // namespace
}  // namespace mor

STABLE_TORCH_LIBRARY_IMPL(mor, CPU, m) {
  m.impl("gather_tokens", TORCH_BOX(&mor::gather_tokens));
}
