// The route family's host side as far as it is the same on every device, and its CPU kernels.
#pragma once

#include "common/cpu_isa.h"
#include "route/params.h"
#include "torch_abi.h"

namespace mor {

MOR_DECLARE_CPU_KERNEL(route_topk, RouteTopkParams)
MOR_DECLARE_CPU_KERNEL(route_depth, RouteDepthParams)

inline void check_route_topk(const Checks& check, const Tensor& scores, const Tensor& cu_seqlens,
                             const Tensor& cu_seqlens_out, int64_t total_out, int64_t max_seqlen) {
  check.floating("scores", scores);
  check.shape("scores", scores, {-1}, "[N]");
  check.indices("cu_seqlens", cu_seqlens, scores, {-1}, "[batch + 1]");
  check.require(cu_seqlens.numel() > 0, "cu_seqlens", "of shape [batch + 1]",
                shape_str(cu_seqlens));
  check.indices("cu_seqlens_out", cu_seqlens_out, scores, {cu_seqlens.numel()}, "[batch + 1]");

  const int64_t rows = scores.numel(), batch = cu_seqlens.numel() - 1;
  const Readable start(cu_seqlens), start_out(cu_seqlens_out);
  if (start && start_out) {
    check.cumulative("cu_seqlens", start.data(), batch, rows);
    check.cumulative("cu_seqlens_out", start_out.data(), batch, total_out);
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
  }
  // What the host can see; the messages above say more about the same mistakes.
  check.require(rows <= std::numeric_limits<int32_t>::max(), "scores", "of size below 2^31",
                shape_str(scores));
  check.require(total_out >= 0 && total_out <= rows, "total_out", str("in [0, ", rows, "]"),
                total_out);
}

// run(check, params) provides params.scratch and calls the kernel.
template <typename Run>
Tensor run_route_topk(Run&& run, const Tensor& scores, const Tensor& cu_seqlens,
                      const Tensor& cu_seqlens_out, int64_t total_out, int64_t max_seqlen) {
  const Checks check("route_topk");
  check_route_topk(check, scores, cu_seqlens, cu_seqlens_out, total_out, max_seqlen);
  const Tensor dense_scores = dense(scores);
  const Tensor dense_lengths = dense(cu_seqlens), dense_counts = dense(cu_seqlens_out);
  Tensor index = new_tensor(scores, {total_out}, ScalarType::Int);
  run(check, RouteTopkParams{.scores = dense_scores.const_data_ptr(),
                             .cu_seqlens = dense_lengths.const_data_ptr<int32_t>(),
                             .cu_seqlens_out = dense_counts.const_data_ptr<int32_t>(),
                             .scratch = nullptr,
                             .index = index.mutable_data_ptr<int32_t>(),
                             .rows = scores.numel(),
                             .batch = cu_seqlens.numel() - 1,
                             .total_out = total_out,
                             .max_seqlen = std::clamp<int64_t>(max_seqlen, 0, scores.numel()),
                             .dtype = dtype_of(scores)});
  return index;
}

// run(check, params) calls the kernel.
template <typename Run>
std::tuple<Tensor, Tensor> run_route_depth(Run&& run, const Tensor& logits,
                                           const std::optional<Tensor>& bias) {
  const Checks check("route_depth");
  check.floating("logits", logits);
  check.shape("logits", logits, {-1, -1}, "[N, num_recursions]");
  const int64_t rows = logits.size(0), recursions = logits.size(1);
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  check.require(recursions >= 1 && recursions <= kMax && rows <= kMax, "logits",
                "of at least one recursion and of sizes below 2^31", shape_str(logits));
  Tensor wide_bias;
  if (bias) {
    check.same_device("bias", *bias, logits);
    check.factor_dtype("bias", *bias, logits);
    check.shape("bias", *bias, {recursions}, "[num_recursions]");
    wide_bias = dense(torch::stable::to(*bias, accumulate_dtype(logits)));
  }

  const Tensor dense_logits = dense(logits);
  Tensor depth = new_tensor(logits, {rows}, ScalarType::Int);
  Tensor load = new_tensor(logits, {recursions}, ScalarType::Int);
  run(check, RouteDepthParams{.logits = dense_logits.const_data_ptr(),
                              .bias = bias ? wide_bias.const_data_ptr() : nullptr,
                              .depth = depth.mutable_data_ptr<int32_t>(),
                              .load = load.mutable_data_ptr<int32_t>(),
                              .rows = rows,
                              .recursions = recursions,
                              .dtype = dtype_of(logits)});
  return {depth, load};
}

}  // namespace mor
