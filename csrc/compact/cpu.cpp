// CPU host side of the compact family: calls of the kernels, registration.
#include "compact/compact.h"

namespace mor {
namespace {

std::tuple<Tensor, Tensor> compact_depth(const Tensor& depth, const Tensor& cu_seqlens,
                                         int64_t num_recursions) {
  const CompactDepthCall call(Checks("compact_depth"), depth, cu_seqlens, num_recursions);
  cpu::compact_depth(call.params);
  return {call.index, call.cu_seqlens_out};
}

Tensor gather_tokens(const Tensor& x, const Tensor& index) {
  const GatherTokensCall call(Checks("gather_tokens"), x, index);
  cpu::gather_tokens(call.params);
  return call.out;
}

Tensor gather_tokens_bwd(const Tensor& grad, const Tensor& index, int64_t num_rows) {
  const GatherTokensBwdCall call(Checks("gather_tokens_bwd"), grad, index, num_rows);
  fill_inverse(call.params.inverse);
  cpu::gather_tokens_bwd(call.params);
  return call.grad_x;
}

Tensor scatter_tokens(const Tensor& x, const Tensor& update, const Tensor& index,
                      const std::optional<Tensor>& gate) {
  const ScatterTokensCall call(Checks("scatter_tokens"), x, update, index, gate);
  fill_inverse(call.params.inverse);
  cpu::scatter_tokens(call.params);
  return call.out;
}

void scatter_tokens_(Tensor x, const Tensor& update, const Tensor& index,
                     const std::optional<Tensor>& gate) {
  ScatterTokensInplaceCall call(Checks("scatter_tokens_"), x, update, index, gate);
  cpu::scatter_tokens_(call.params);
  call.finish();
}

std::tuple<Tensor, Tensor> scatter_tokens_bwd(const Tensor& grad, const Tensor& index,
                                              const std::optional<Tensor>& update,
                                              const std::optional<Tensor>& gate) {
  const ScatterTokensBwdCall call(Checks("scatter_tokens_bwd"), grad, index, update, gate);
  cpu::scatter_tokens_bwd(call.params);
  return {call.grad_update, call.grad_gate};
}

std::tuple<Tensor, Tensor, Tensor> gather_rms_norm(const Tensor& x, const Tensor& index,
                                                   const Tensor& weight, double eps) {
  const GatherRmsNormCall call(Checks("gather_rms_norm"), x, index, weight, eps);
  cpu::gather_rms_norm(call.params);
  return {call.rows, call.normed, call.rstd};
}

std::tuple<Tensor, Tensor> gather_rms_norm_bwd(const std::optional<Tensor>& grad_rows,
                                               const std::optional<Tensor>& grad_normed,
                                               const Tensor& rows, const Tensor& rstd,
                                               const Tensor& index, const Tensor& weight,
                                               int64_t num_rows) {
  GatherRmsNormBwdCall call(Checks("gather_rms_norm_bwd"), grad_rows, grad_normed, rows, rstd,
                            index, weight, num_rows);
  fill_inverse(call.params.inverse);
  // By the shape alone, so that the sum does not depend on the number of threads.
  call.set_blocks(std::clamp<int64_t>(num_rows / 32, 1, 64));
  cpu::gather_rms_norm_bwd(call.params);
  return {call.grad_x, call.grad_weight};
}

}  // namespace
}  // namespace mor

STABLE_TORCH_LIBRARY_IMPL(mor, CPU, m) {
  m.impl("compact_depth", TORCH_BOX(&mor::compact_depth));
  m.impl("gather_tokens", TORCH_BOX(&mor::gather_tokens));
  m.impl("gather_tokens_bwd", TORCH_BOX(&mor::gather_tokens_bwd));
  m.impl("scatter_tokens", TORCH_BOX(&mor::scatter_tokens));
  m.impl("scatter_tokens_", TORCH_BOX(&mor::scatter_tokens_));
  m.impl("scatter_tokens_bwd", TORCH_BOX(&mor::scatter_tokens_bwd));
  m.impl("gather_rms_norm", TORCH_BOX(&mor::gather_rms_norm));
  m.impl("gather_rms_norm_bwd", TORCH_BOX(&mor::gather_rms_norm_bwd));
}
