// CPU host side of the route family: checks, allocation, registration.
#include "route/route.h"
#include "torch_abi.h"

namespace mor {
namespace {

Tensor route_topk(const Tensor& scores, const Tensor& cu_seqlens, const Tensor& cu_seqlens_out,
                  int64_t total_out, int64_t max_seqlen) {
  const Checks check("route_topk");
  check.floating("scores", scores);
  check.shape("scores", scores, {-1}, "[N]");
  check.int32_vector("cu_seqlens", cu_seqlens, -1, "[batch + 1]");
  check.require(cu_seqlens.numel() > 0, "cu_seqlens", "of shape [batch + 1]",
                shape_str(cu_seqlens));
  check.int32_vector("cu_seqlens_out", cu_seqlens_out, cu_seqlens.numel(), "[batch + 1]");

  const int64_t batch = cu_seqlens.numel() - 1;
  const Tensor dense_lengths = dense(cu_seqlens), dense_counts = dense(cu_seqlens_out);
  const auto* start = dense_lengths.const_data_ptr<int32_t>();
  const auto* start_out = dense_counts.const_data_ptr<int32_t>();
  check.cumulative("cu_seqlens", start, batch, scores.numel());
  check.cumulative("cu_seqlens_out", start_out, batch, total_out);
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t length = start[b + 1] - start[b];
    const int32_t count = start_out[b + 1] - start_out[b];
    if (length > max_seqlen) {
      check.fail("max_seqlen", "at least the longest sequence",
                 str(max_seqlen, " for length ", length, " of sequence ", b));
    }
    if (count > length) {
      check.fail("cu_seqlens_out", "steps of at most the length of the sequence",
                 str(count, " for length ", length, " of sequence ", b));
    }
  }

  const Tensor dense_scores = dense(scores);
  Tensor keys = new_tensor(scores, {scores.numel()});
  Tensor index = new_tensor(scores, {total_out}, ScalarType::Int);
  cpu::route_topk({.scores = dense_scores.const_data_ptr(),
                   .cu_seqlens = start,
                   .cu_seqlens_out = start_out,
                   .keys = keys.mutable_data_ptr(),
                   .index = index.mutable_data_ptr<int32_t>(),
                   .rows = scores.numel(),
                   .batch = batch,
                   .dtype = dtype_of(scores)});
  return index;
}

std::tuple<Tensor, Tensor> route_depth(const Tensor& logits, const std::optional<Tensor>& bias) {
  const Checks check("route_depth");
  check.floating("logits", logits);
  check.shape("logits", logits, {-1, -1}, "[N, num_recursions]");
  const int64_t rows = logits.size(0), recursions = logits.size(1);
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  check.require(recursions >= 1 && recursions <= kMax && rows <= kMax, "logits",
                "of at least one recursion and of sizes below 2^31", shape_str(logits));
  Tensor wide_bias;
  if (bias) {
    check.on_cpu("bias", *bias);
    check.factor_dtype("bias", *bias, logits);
    check.shape("bias", *bias, {recursions}, "[num_recursions]");
    wide_bias = dense(torch::stable::to(*bias, accumulate_dtype(logits)));
  }

  const Tensor dense_logits = dense(logits);
  Tensor depth = new_tensor(logits, {rows}, ScalarType::Int);
  Tensor load = new_tensor(logits, {recursions}, ScalarType::Int);
  cpu::route_depth({.logits = dense_logits.const_data_ptr(),
                    .bias = bias ? wide_bias.const_data_ptr() : nullptr,
                    .depth = depth.mutable_data_ptr<int32_t>(),
                    .load = load.mutable_data_ptr<int32_t>(),
                    .rows = rows,
                    .recursions = recursions,
                    .dtype = dtype_of(logits)});
  return {depth, load};
}

}  // namespace
}  // namespace mor

STABLE_TORCH_LIBRARY_IMPL(mor, CPU, m) {
  m.impl("route_topk", TORCH_BOX(&mor::route_topk));
  m.impl("route_depth", TORCH_BOX(&mor::route_depth));
}
