// CUDA host side of the route family.
#include "route/launch.h"
#include "route/route.h"

namespace mor {
namespace {

Tensor route_topk(const Tensor& scores, const Tensor& cu_seqlens, const Tensor& cu_seqlens_out,
                  int64_t total_out, int64_t max_seqlen) {
  const auto run = [&](const Checks& check, RouteTopkParams params) {
    const OnDevice device(scores);
    const int64_t words = cuda::route_topk_scratch_bytes(params) / sizeof(int32_t);
    Tensor scratch = new_tensor(scores, {words}, ScalarType::Int);
    params.scratch = scratch.mutable_data_ptr();
    const cudaError_t error = cuda::route_topk(params, static_cast<cudaStream_t>(device.stream()));
    check.launched(error, cudaGetErrorString(error));
  };
  return run_route_topk(run, scores, cu_seqlens, cu_seqlens_out, total_out, max_seqlen);
}

std::tuple<Tensor, Tensor> route_depth(const Tensor& logits, const std::optional<Tensor>& bias) {
  const auto run = [&](const Checks& check, const RouteDepthParams& params) {
    const OnDevice device(logits);
    const cudaError_t error = cuda::route_depth(params, static_cast<cudaStream_t>(device.stream()));
    check.launched(error, cudaGetErrorString(error));
  };
  return run_route_depth(run, logits, bias);
}

}  // namespace
}  // namespace mor

MOR_LIBRARY_IMPL_CUDA(m) {
  m.impl("route_topk", TORCH_BOX(&mor::route_topk));
  m.impl("route_depth", TORCH_BOX(&mor::route_depth));
}
