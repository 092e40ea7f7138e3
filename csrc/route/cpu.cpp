// CPU host side of the route family.
#include "route/route.h"

namespace mor {
namespace {

Tensor route_topk(const Tensor& scores, const Tensor& cu_seqlens, const Tensor& cu_seqlens_out,
                  int64_t total_out, int64_t max_seqlen) {
  const auto run = [&](const Checks&, RouteTopkParams params) {
    Tensor keys = new_tensor(scores, {scores.numel()});
    params.scratch = keys.mutable_data_ptr();
    cpu::route_topk(params);
  };
  return run_route_topk(run, scores, cu_seqlens, cu_seqlens_out, total_out, max_seqlen);
}

std::tuple<Tensor, Tensor> route_depth(const Tensor& logits, const std::optional<Tensor>& bias) {
  const auto run = [](const Checks&, const RouteDepthParams& params) { cpu::route_depth(params); };
  return run_route_depth(run, logits, bias);
}

}  // namespace
}  // namespace mor

STABLE_TORCH_LIBRARY_IMPL(mor, CPU, m) {
  m.impl("route_topk", TORCH_BOX(&mor::route_topk));
  m.impl("route_depth", TORCH_BOX(&mor::route_depth));
}
