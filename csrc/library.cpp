// Every schema of torch.ops.mor: the table of contents. Semantics: docstrings of mor_ext/ops.
#include "torch_abi.h"

MOR_LIBRARY(m) {
  // route
  m.def(
      "route_topk(Tensor scores, Tensor cu_seqlens, Tensor cu_seqlens_out, SymInt total_out, "
      "SymInt max_seqlen) -> Tensor index");
  m.def("route_depth(Tensor logits, Tensor? bias) -> (Tensor depth, Tensor load)");

  // compact
  m.def(
      "compact_depth(Tensor depth, Tensor cu_seqlens, SymInt num_recursions) -> "
      "(Tensor index, Tensor cu_seqlens_out)");
  m.def("gather_tokens(Tensor x, Tensor index) -> Tensor");
  m.def("gather_tokens_bwd(Tensor grad, Tensor index, SymInt num_rows) -> Tensor");
  m.def("scatter_tokens(Tensor x, Tensor update, Tensor index, Tensor? gate) -> Tensor");
  m.def("scatter_tokens_(Tensor(a!) x, Tensor update, Tensor index, Tensor? gate) -> ()");
  m.def(
      "scatter_tokens_bwd(Tensor grad, Tensor index, Tensor? update, Tensor? gate) -> "
      "(Tensor grad_update, Tensor grad_gate)");
  m.def(
      "gather_rms_norm(Tensor x, Tensor index, Tensor weight, float eps) -> "
      "(Tensor rows, Tensor normed, Tensor rstd)");
  m.def(
      "gather_rms_norm_bwd(Tensor? grad_rows, Tensor? grad_normed, Tensor rows, Tensor rstd, "
      "Tensor index, Tensor weight, SymInt num_rows) -> (Tensor grad_x, Tensor grad_weight)");

  // kv_cache
  m.def(
      "rotary(Tensor query, Tensor key, Tensor cos, Tensor sin, Tensor positions) -> "
      "(Tensor, Tensor)");
  m.def(
      "kv_append(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
      "Tensor block_table, Tensor cache_seqlens, Tensor cu_seqlens) -> ()");
  m.def(
      "rotary_kv_append(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, "
      "Tensor positions, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor block_table, "
      "Tensor cache_seqlens, Tensor cu_seqlens) -> Tensor");

  // attention
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, "
      "Tensor cu_seqlens_k, Tensor? key_limit, SymInt max_seqlen_q, SymInt max_seqlen_k, "
      "float softmax_scale) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_bwd(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
      "Tensor out, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? key_limit, "
      "SymInt max_seqlen_q, SymInt max_seqlen_k, float softmax_scale) -> "
      "(Tensor grad_query, Tensor grad_key, Tensor grad_value)");
  m.def(
      "paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, "
      "Tensor cache_seqlens, Tensor cu_seqlens_q, Tensor? key_limit, SymInt max_seqlen_q, "
      "float softmax_scale) -> (Tensor out, Tensor lse)");

  // see mor_ext.set_debug
  m.def("set_debug(bool enabled) -> ()");
}

namespace mor {
namespace {

void set_debug(bool enabled) {
  debug_checks = enabled;
}

}  // namespace
}  // namespace mor

MOR_LIBRARY_IMPL_ANY(m) {
  m.impl("set_debug", TORCH_BOX(&mor::set_debug));
}
