// CUDA host side of the compact family: calls of the kernels, registration.
#include "compact/compact.h"
#include "compact/launch.h"

namespace mor {
namespace {

// launch(params, stream) on the tensor's device and its current stream.
template <typename Params>
void run(const Checks& check, const Tensor& tensor,
         cudaError_t (*launch)(const Params&, cudaStream_t), const Params& params) {
  const OnDevice device(tensor);
  const cudaError_t error = launch(params, static_cast<cudaStream_t>(device.stream()));
  check.launched(error, cudaGetErrorString(error));
}

std::tuple<Tensor, Tensor> compact_depth(const Tensor& depth, const Tensor& cu_seqlens,
                                         int64_t num_recursions) {
  const Checks check("compact_depth");
  CompactDepthCall call(check, depth, cu_seqlens, num_recursions);
  const Tensor scratch =
      new_tensor(depth, {cuda::compact_depth_scratch_bytes(call.params)}, ScalarType::Byte);
  call.params.scratch = scratch.mutable_data_ptr();
  run(check, depth, cuda::compact_depth, call.params);
  return {call.index, call.cu_seqlens_out};
}

Tensor gather_tokens(const Tensor& x, const Tensor& index) {
  const Checks check("gather_tokens");
  const GatherTokensCall call(check, x, index);
  run(check, x, cuda::gather_tokens, call.params);
  return call.out;
}

Tensor gather_tokens_bwd(const Tensor& grad, const Tensor& index, int64_t num_rows) {
  const Checks check("gather_tokens_bwd");
  const GatherTokensBwdCall call(check, grad, index, num_rows);
  run(check, grad, cuda::gather_tokens_bwd, call.params);
  return call.grad_x;
}

Tensor scatter_tokens(const Tensor& x, const Tensor& update, const Tensor& index,
                      const std::optional<Tensor>& gate) {
  const Checks check("scatter_tokens");
  const ScatterTokensCall call(check, x, update, index, gate);
  run(check, x, cuda::scatter_tokens, call.params);
  return call.out;
}

void scatter_tokens_(Tensor x, const Tensor& update, const Tensor& index,
                     const std::optional<Tensor>& gate) {
  const Checks check("scatter_tokens_");
  ScatterTokensInplaceCall call(check, x, update, index, gate);
  run(check, x, cuda::scatter_tokens_, call.params);
  call.finish();
}

std::tuple<Tensor, Tensor> scatter_tokens_bwd(const Tensor& grad, const Tensor& index,
                                              const std::optional<Tensor>& update,
                                              const std::optional<Tensor>& gate) {
  const Checks check("scatter_tokens_bwd");
  const ScatterTokensBwdCall call(check, grad, index, update, gate);
  run(check, grad, cuda::scatter_tokens_bwd, call.params);
  return {call.grad_update, call.grad_gate};
}

std::tuple<Tensor, Tensor, Tensor> gather_rms_norm(const Tensor& x, const Tensor& index,
                                                   const Tensor& weight, double eps) {
  const Checks check("gather_rms_norm");
  const GatherRmsNormCall call(check, x, index, weight, eps);
  run(check, x, cuda::gather_rms_norm, call.params);
  return {call.rows, call.normed, call.rstd};
}

std::tuple<Tensor, Tensor> gather_rms_norm_bwd(const std::optional<Tensor>& grad_rows,
                                               const std::optional<Tensor>& grad_normed,
                                               const Tensor& rows, const Tensor& rstd,
                                               const Tensor& index, const Tensor& weight,
                                               int64_t num_rows) {
  const Checks check("gather_rms_norm_bwd");
  GatherRmsNormBwdCall call(check, grad_rows, grad_normed, rows, rstd, index, weight, num_rows);
  const OnDevice device(rows);
  call.set_blocks(cuda::gather_rms_norm_bwd_blocks(call.params));
  run(check, rows, cuda::gather_rms_norm_bwd, call.params);
  return {call.grad_x, call.grad_weight};
}

}  // namespace
}  // namespace mor

MOR_LIBRARY_IMPL_CUDA(m) {
  m.impl("compact_depth", TORCH_BOX(&mor::compact_depth));
  m.impl("gather_tokens", TORCH_BOX(&mor::gather_tokens));
  m.impl("gather_tokens_bwd", TORCH_BOX(&mor::gather_tokens_bwd));
  m.impl("scatter_tokens", TORCH_BOX(&mor::scatter_tokens));
  m.impl("scatter_tokens_", TORCH_BOX(&mor::scatter_tokens_));
  m.impl("scatter_tokens_bwd", TORCH_BOX(&mor::scatter_tokens_bwd));
  m.impl("gather_rms_norm", TORCH_BOX(&mor::gather_rms_norm));
  m.impl("gather_rms_norm_bwd", TORCH_BOX(&mor::gather_rms_norm_bwd));
}
