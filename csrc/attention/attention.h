// Argument checks of the attention family, shared by all devices.
#pragma once

#include <cmath>

#include "torch_abi.h"

namespace mor {

namespace attention_checks {

inline void query_and_scale(const Checks& check, const Tensor& query, double softmax_scale) {
  check.floating("query", query);
  check.shape("query", query, {-1, -1, -1}, "[total_q, heads, head_dim]");
  const int64_t head_dim = query.size(2);
  check.require(head_dim % 8 == 0 && head_dim >= 8 && head_dim <= 256, "query",
                "of head_dim a multiple of 8 in [8, 256]", head_dim);
  check.require(std::isfinite(softmax_scale), "softmax_scale", "finite", softmax_scale);
}

inline void heads(const Checks& check, const Tensor& query, const char* key, int64_t kv_heads) {
  check.require(kv_heads >= 1, key, "of at least one KV head", kv_heads);
  const int64_t heads = query.size(1);
  if (heads < 1 || heads % kv_heads != 0) {
    check.fail("query", str("of heads a multiple of kv_heads = ", kv_heads), heads);
  }
}

inline void cu_seqlens(const Checks& check, const char* argument, const Tensor& cu_seqlens,
                       const Tensor& like, int64_t batch, const char* rule) {
  check.indices(argument, cu_seqlens, like, {batch < 0 ? -1 : batch + 1}, rule);
  check.require(cu_seqlens.numel() >= 1, argument, "of at least one element", 0);
}

inline void key_limit(const Checks& check, const std::optional<Tensor>& key_limit,
                      const Tensor& query) {
  if (key_limit) {
    check.indices("key_limit", *key_limit, query, {query.size(0)}, "[total_q]");
  }
}

// ---- contents, where they can be read ----

inline void lengths(const Checks& check, const char* argument, const Tensor& cu_seqlens,
                    int64_t total, const char* max_argument, int64_t max_seqlen) {
  const Readable cu(cu_seqlens);
  if (!cu) {
    return;
  }
  const int64_t batch = cu_seqlens.numel() - 1;
  check.cumulative(argument, cu.data(), batch, total);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = cu[b + 1] - cu[b];
    if (length > max_seqlen) {
      check.fail(max_argument, str("at least ", length, ", the length of sequence ", b),
                 max_seqlen);
    }
  }
}

// len_k(b): how many keys sequence or lane b has; called where contents can be read.
template <typename LenK>
void limits(const Checks& check, const std::optional<Tensor>& key_limit, const Tensor& cu_seqlens_q,
            const LenK& len_k) {
  if (!key_limit) {
    return;
  }
  const Readable limit(*key_limit), cu(cu_seqlens_q);
  if (!limit) {
    return;
  }
  for (int64_t b = 0; b + 1 < cu_seqlens_q.numel(); ++b) {
    int32_t previous = 0;
    for (int64_t i = cu[b]; i < cu[b + 1]; ++i) {
      if (limit[i] < 0 || limit[i] > len_k(b)) {
        check.fail("key_limit", str("in [0, ", len_k(b), "] in sequence ", b),
                   str(limit[i], " at element ", i));
      }
      if (limit[i] < previous) {
        check.fail("key_limit", str("non-decreasing in sequence ", b),
                   str(previous, " then ", limit[i], " at element ", i));
      }
      previous = limit[i];
    }
  }
}

// Every block that a lane's entries lie in exists.
inline void blocks(const Checks& check, const Tensor& block_table, const Tensor& cache_seqlens,
                   int64_t num_blocks, int64_t block_size) {
  const Readable table(block_table), lens(cache_seqlens);
  if (!lens) {
    return;
  }
  const int64_t lanes = block_table.size(0), max_blocks = block_table.size(1);
  check.within("cache_seqlens", lens.data(), lanes, 0, max_blocks * block_size + 1);
  for (int64_t s = 0; s < lanes; ++s) {
    for (int64_t i = 0; i * block_size < lens[s]; ++i) {
      const int32_t block = table[s * max_blocks + i];
      if (block < 0 || block >= num_blocks) {
        check.fail("block_table", str("in [0, ", num_blocks, ") where a lane has entries"),
                   str(block, " at lane ", s, ", block ", i));
      }
    }
  }
}

}  // namespace attention_checks

inline void check_attention(const char* op, const Tensor& query, const Tensor& key,
                            const Tensor& value, const Tensor& cu_seqlens_q,
                            const Tensor& cu_seqlens_k, const std::optional<Tensor>& key_limit,
                            int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale) {
  namespace checks = attention_checks;
  const Checks check(op);
  checks::query_and_scale(check, query, softmax_scale);
  const char* key_shape = "[total_k, kv_heads, head_dim]";
  check.data("key", key, query, {-1, -1, query.size(2)}, key_shape);
  check.data("value", value, query, {key.size(0), key.size(1), key.size(2)}, key_shape);
  checks::heads(check, query, "key", key.size(1));
  checks::cu_seqlens(check, "cu_seqlens_q", cu_seqlens_q, query, -1, "[batch + 1]");
  checks::cu_seqlens(check, "cu_seqlens_k", cu_seqlens_k, query, cu_seqlens_q.numel() - 1,
                     "[batch + 1] like cu_seqlens_q");
  checks::key_limit(check, key_limit, query);
  check.require(max_seqlen_q >= 0, "max_seqlen_q", "non-negative", max_seqlen_q);
  check.require(max_seqlen_k >= 0, "max_seqlen_k", "non-negative", max_seqlen_k);
  checks::lengths(check, "cu_seqlens_q", cu_seqlens_q, query.size(0), "max_seqlen_q", max_seqlen_q);
  checks::lengths(check, "cu_seqlens_k", cu_seqlens_k, key.size(0), "max_seqlen_k", max_seqlen_k);
  const Readable cu_k(cu_seqlens_k);
  checks::limits(check, key_limit, cu_seqlens_q, [&](int64_t b) { return cu_k[b + 1] - cu_k[b]; });
}

inline void check_attention_bwd(const char* op, const Tensor& grad_out,
                                const std::optional<Tensor>& grad_lse, const Tensor& query,
                                const Tensor& key, const Tensor& value, const Tensor& out,
                                const Tensor& lse, const Tensor& cu_seqlens_q,
                                const Tensor& cu_seqlens_k, const std::optional<Tensor>& key_limit,
                                int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale) {
  check_attention(op, query, key, value, cu_seqlens_q, cu_seqlens_k, key_limit, max_seqlen_q,
                  max_seqlen_k, softmax_scale);
  const Checks check(op);
  const int64_t total_q = query.size(0), heads = query.size(1), head_dim = query.size(2);
  const auto data = [&](const char* argument, const Tensor& tensor) {
    check.data(argument, tensor, query, {total_q, heads, head_dim},
               "[total_q, heads, head_dim] like query");
  };
  const auto lse_like = [&](const char* argument, const Tensor& tensor) {
    check.same_device(argument, tensor, query);
    check.dtype(argument, tensor, accumulate_dtype(query));
    check.shape(argument, tensor, {heads, total_q}, "[heads, total_q]");
  };
  data("grad_out", grad_out);
  data("out", out);
  lse_like("lse", lse);
  if (grad_lse) {
    lse_like("grad_lse", *grad_lse);
  }
}

inline void check_paged_attention(const char* op, const Tensor& query, const Tensor& key_cache,
                                  const Tensor& value_cache, const Tensor& block_table,
                                  const Tensor& cache_seqlens, const Tensor& cu_seqlens_q,
                                  const std::optional<Tensor>& key_limit, int64_t max_seqlen_q,
                                  double softmax_scale) {
  namespace checks = attention_checks;
  const Checks check(op);
  checks::query_and_scale(check, query, softmax_scale);
  const char* cache_shape = "[num_blocks, block_size, kv_heads, head_dim]";
  check.data("key_cache", key_cache, query, {-1, -1, -1, query.size(2)}, cache_shape);
  const int64_t num_blocks = key_cache.size(0), block_size = key_cache.size(1);
  check.data("value_cache", value_cache, query,
             {num_blocks, block_size, key_cache.size(2), key_cache.size(3)}, cache_shape);
  check.require(block_size >= 1, "key_cache", "of block_size at least 1", block_size);
  checks::heads(check, query, "key_cache", key_cache.size(2));
  check.indices("block_table", block_table, query, {-1, -1}, "[lanes, max_blocks]");
  const int64_t lanes = block_table.size(0);
  check.indices("cache_seqlens", cache_seqlens, query, {lanes}, "[lanes]");
  checks::cu_seqlens(check, "cu_seqlens_q", cu_seqlens_q, query, lanes, "[lanes + 1]");
  checks::key_limit(check, key_limit, query);
  check.require(max_seqlen_q >= 0, "max_seqlen_q", "non-negative", max_seqlen_q);
  checks::lengths(check, "cu_seqlens_q", cu_seqlens_q, query.size(0), "max_seqlen_q", max_seqlen_q);
  checks::blocks(check, block_table, cache_seqlens, num_blocks, block_size);
  const Readable lens(cache_seqlens);
  checks::limits(check, key_limit, cu_seqlens_q, [&](int64_t s) { return lens[s]; });
}

}  // namespace mor
