// The ops of the attention family on any device: checks, layouts, allocation.
//
// A Device is made with the op's name and a tensor on the device. It has rows(tensor), the tensor
// with the layout that its kernels read (dense rows at least), and the kernels:
// attention(AttentionParams), paged_attention(AttentionParams) and
// attention_bwd(AttentionBwdParams).
#pragma once

#include "attention/attention.h"
#include "attention/params.h"

namespace mor {

// Dense copies of int32 arguments, where they were strided, that live as long as the kernel runs.
class Indices {
 public:
  const int32_t* operator()(const Tensor& tensor) {
    return kept_.emplace_back(dense(tensor)).const_data_ptr<int32_t>();
  }
  const int32_t* operator()(const std::optional<Tensor>& tensor) {
    return tensor ? (*this)(*tensor) : nullptr;
  }

 private:
  std::vector<Tensor> kept_;
};

template <typename Device>
struct AttentionOps {
  static std::tuple<Tensor, Tensor> attention(const Tensor& query, const Tensor& key,
                                              const Tensor& value, const Tensor& cu_seqlens_q,
                                              const Tensor& cu_seqlens_k,
                                              const std::optional<Tensor>& key_limit,
                                              int64_t max_seqlen_q, int64_t max_seqlen_k,
                                              double softmax_scale) {
    check_attention("attention", query, key, value, cu_seqlens_q, cu_seqlens_k, key_limit,
                    max_seqlen_q, max_seqlen_k, softmax_scale);
    const Device device("attention", query);
    const Tensor q = device.rows(query), k = device.rows(key), v = device.rows(value);
    Tensor out = like(query), lse = lse_of(query);
    Indices indices;
    AttentionParams p =
        packed_params(q, k, v, cu_seqlens_q, cu_seqlens_k, key_limit, softmax_scale, indices);
    p.out = out.mutable_data_ptr();
    p.lse = lse.mutable_data_ptr();
    device.attention(p);
    return {out, lse};
  }

  static std::tuple<Tensor, Tensor, Tensor> attention_bwd(
      const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& query,
      const Tensor& key, const Tensor& value, const Tensor& out, const Tensor& lse,
      const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
      const std::optional<Tensor>& key_limit, int64_t max_seqlen_q, int64_t max_seqlen_k,
      double softmax_scale) {
    check_attention_bwd("attention_bwd", grad_out, grad_lse, query, key, value, out, lse,
                        cu_seqlens_q, cu_seqlens_k, key_limit, max_seqlen_q, max_seqlen_k,
                        softmax_scale);
    const Device device("attention_bwd", query);
    const Tensor q = device.rows(query), k = device.rows(key), v = device.rows(value);
    const Tensor grad = device.rows(grad_out), o = device.rows(dense(out)), l = dense(lse);
    const std::optional<Tensor> grad_l = grad_lse ? std::optional(dense(*grad_lse)) : std::nullopt;
    Tensor grad_query = like(query), grad_key = like(key), grad_value = like(value);
    Indices indices;
    AttentionParams p =
        packed_params(q, k, v, cu_seqlens_q, cu_seqlens_k, key_limit, softmax_scale, indices);
    p.out = const_cast<void*>(o.const_data_ptr());
    p.lse = const_cast<void*>(l.const_data_ptr());
    device.attention_bwd({.forward = p,
                          .grad_out = head_rows(grad),
                          .grad_lse = grad_l ? grad_l->const_data_ptr() : nullptr,
                          .grad_query = grad_query.mutable_data_ptr(),
                          .grad_key = grad_key.mutable_data_ptr(),
                          .grad_value = grad_value.mutable_data_ptr()});
    return {grad_query, grad_key, grad_value};
  }

  static std::tuple<Tensor, Tensor> paged_attention(
      const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
      const Tensor& block_table, const Tensor& cache_seqlens, const Tensor& cu_seqlens_q,
      const std::optional<Tensor>& key_limit, int64_t max_seqlen_q, double softmax_scale) {
    check_paged_attention("paged_attention", query, key_cache, value_cache, block_table,
                          cache_seqlens, cu_seqlens_q, key_limit, max_seqlen_q, softmax_scale);
    const Device device("paged_attention", query);
    const Tensor q = device.rows(query), k = device.rows(key_cache), v = device.rows(value_cache);
    Tensor out = like(query), lse = lse_of(query);
    Indices indices;
    AttentionParams p = query_params(q, key_cache.size(2), indices(cu_seqlens_q),
                                     cu_seqlens_q.numel() - 1, indices(key_limit), softmax_scale);
    p.max_seqlen_q = max_seqlen_q;
    p.kv.key = head_rows(k);
    p.kv.value = head_rows(v);
    p.kv.seqlens = indices(cache_seqlens);
    p.kv.block_table = indices(block_table);
    p.kv.num_blocks = key_cache.size(0);
    p.kv.max_blocks = block_table.size(1);
    p.kv.block_size = key_cache.size(1);
    p.kv.key_block_stride = k.stride(0);
    p.kv.value_block_stride = v.stride(0);
    p.out = out.mutable_data_ptr();
    p.lse = lse.mutable_data_ptr();
    device.paged_attention(p);
    return {out, lse};
  }

 private:
  static Tensor like(const Tensor& t) { return new_tensor(t, {t.size(0), t.size(1), t.size(2)}); }

  static Tensor lse_of(const Tensor& query) {
    return new_tensor(query, {query.size(1), query.size(0)}, accumulate_dtype(query));
  }

  // The last two dimensions of rows are (heads, head_dim), the one before is the row.
  static HeadRows head_rows(const Tensor& rows) {
    const int64_t d = rows.dim();
    return {rows.const_data_ptr(), rows.stride(d - 3), rows.stride(d - 2)};
  }

  // Everything but kv, out and lse.
  static AttentionParams query_params(const Tensor& query, int64_t kv_heads,
                                      const int32_t* cu_seqlens_q, int64_t batch,
                                      const int32_t* key_limit, double softmax_scale) {
    AttentionParams p{};
    p.query = head_rows(query);
    p.cu_seqlens_q = cu_seqlens_q;
    p.key_limit = key_limit;
    p.batch = batch;
    p.total_q = query.size(0);
    p.heads = query.size(1);
    p.kv_heads = kv_heads;
    p.head_dim = query.size(2);
    p.softmax_scale = softmax_scale;
    p.dtype = dtype_of(query);
    return p;
  }

  // Everything but out and lse, over packed keys and values.
  static AttentionParams packed_params(const Tensor& query, const Tensor& key, const Tensor& value,
                                       const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                       const std::optional<Tensor>& key_limit, double softmax_scale,
                                       Indices& indices) {
    AttentionParams p = query_params(query, key.size(1), indices(cu_seqlens_q),
                                     cu_seqlens_q.numel() - 1, indices(key_limit), softmax_scale);
    p.kv.key = head_rows(key);
    p.kv.value = head_rows(value);
    p.kv.cu_seqlens = indices(cu_seqlens_k);
    p.kv.total_keys = key.size(0);
    return p;
  }
};

}  // namespace mor
