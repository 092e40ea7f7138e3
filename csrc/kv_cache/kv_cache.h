// The kv_cache family's host side, shared by all devices: argument checks, allocation, Params.
#pragma once

#include "common/cpu_isa.h"
#include "kv_cache/params.h"
#include "torch_abi.h"

namespace mor {

// x as Heads; x must have a dense last dimension, see dense_inner.
inline Heads heads_of(const Tensor& x) {
  return {.data = x.const_data_ptr(),
          .heads = x.size(1),
          .token_stride = x.stride(0),
          .head_stride = x.stride(1)};
}

inline CacheBlocks blocks_of(const Tensor& cache) {
  return {.data = cache.mutable_data_ptr(),
          .block_stride = cache.stride(0),
          .entry_stride = cache.stride(1)};
}

namespace kv_cache_checks {

inline void table(const Checks& check, const char* argument, const Tensor& tensor,
                  const Tensor& query, int64_t max_positions) {
  check.same_device(argument, tensor, query);
  if (tensor.scalar_type() != ScalarType::Float) {
    check.dtype(argument, tensor, accumulate_dtype(query));
  }
  check.shape(argument, tensor, {max_positions, query.size(2) / 2},
              "[max_positions, head_dim / 2]");
}

// A cache is written in place, so a layout that the kernels cannot walk is an error, not a copy.
inline void cache(const Checks& check, const char* argument, const Tensor& cache, const Tensor& key,
                  int64_t num_blocks, int64_t block_size) {
  check.data(argument, cache, key, {num_blocks, block_size, key.size(1), key.size(2)},
             "[num_blocks, block_size, kv_heads, head_dim], alike for both caches");
  check.require(cache.size(1) > 0, argument, "of block_size >= 1", shape_str(cache));
  const bool dense_entries = (cache.size(3) == 1 || cache.stride(3) == 1) &&
                             (cache.size(2) == 1 || cache.stride(2) == cache.size(3));
  if (!dense_entries) {
    check.fail(argument, "contiguous in its last two dimensions",
               str("strides ", cache.stride(2), " and ", cache.stride(3)));
  }
  const bool expanded =
      (cache.size(0) > 1 && cache.stride(0) == 0) || (cache.size(1) > 1 && cache.stride(1) == 0);
  check.require(!expanded, argument, "of distinct elements", "an expanded tensor");
}

}  // namespace kv_cache_checks

inline void check_rotary(const Checks& check, const Tensor& query, const Tensor& key,
                         const Tensor& cos, const Tensor& sin, const Tensor& positions) {
  namespace checks = kv_cache_checks;
  check.floating("query", query);
  check.shape("query", query, {-1, -1, -1}, "[N, heads, head_dim]");
  check.require(query.size(2) % 2 == 0, "query", "of even head_dim", query.size(2));
  check.data("key", key, query, {query.size(0), -1, query.size(2)}, "[N, kv_heads, head_dim]");
  checks::table(check, "cos", cos, query, -1);
  checks::table(check, "sin", sin, query, cos.size(0));
  check.indices("positions", positions, query, {query.size(0)}, "[N]");
}

inline void check_append(const Checks& check, const Tensor& key, const Tensor& value,
                         const Tensor& key_cache, const Tensor& value_cache,
                         const Tensor& block_table, const Tensor& cache_seqlens,
                         const Tensor& cu_seqlens) {
  namespace checks = kv_cache_checks;
  check.floating("key", key);
  check.shape("key", key, {-1, -1, -1}, "[N, kv_heads, head_dim]");
  check.data("value", value, key, {key.size(0), key.size(1), key.size(2)},
             "[N, kv_heads, head_dim]");
  checks::cache(check, "key_cache", key_cache, key, -1, -1);
  checks::cache(check, "value_cache", value_cache, key, key_cache.size(0), key_cache.size(1));
  check.indices("cu_seqlens", cu_seqlens, key, {-1}, "[lanes + 1]");
  const int64_t lanes = cu_seqlens.size(0) - 1;
  check.require(lanes >= 0, "cu_seqlens", "of at least one element", 0);
  check.indices("cache_seqlens", cache_seqlens, key, {lanes}, "[lanes]");
  check.indices("block_table", block_table, key, {lanes, -1}, "[lanes, max_blocks]");
}

// The small arguments in the layout that kernels read; most calls copy nothing.
class DenseTable {
 public:
  DenseTable(const Checks& check, const Tensor& query, const Tensor& cos, const Tensor& sin,
             const Tensor& positions)
      : cos_(rows_of(cos, accumulate_dtype(query))),
        sin_(rows_of(sin, accumulate_dtype(query))),
        positions_(dense(positions)) {
    if (const Readable values(positions_); values) {
      check.within("positions", values.data(), values.count(), 0, cos_.size(0));
    }
  }

  RotaryTable view() const {
    return {.cos = cos_.const_data_ptr(),
            .sin = sin_.const_data_ptr(),
            .cos_stride = cos_.stride(0),
            .sin_stride = sin_.stride(0),
            .max_positions = cos_.size(0),
            .positions = positions_.const_data_ptr<int32_t>()};
  }

 private:
  static Tensor rows_of(const Tensor& table, ScalarType dtype) {
    const bool same = table.scalar_type() == dtype;
    return dense_inner(same ? table : torch::stable::to(table, dtype), 1);
  }

  Tensor cos_, sin_, positions_;
};

class DenseLanes {
 public:
  DenseLanes(const Checks& check, const Tensor& key_cache, int64_t tokens,
             const Tensor& block_table, const Tensor& cache_seqlens, const Tensor& cu_seqlens)
      : block_size_(key_cache.size(1)),
        num_blocks_(key_cache.size(0)),
        block_table_(dense(block_table)),
        cache_seqlens_(dense(cache_seqlens)),
        cu_seqlens_(dense(cu_seqlens)) {
    check_slots(check, tokens);
  }

  Lanes view() const {
    return {.block_table = block_table_.const_data_ptr<int32_t>(),
            .cache_seqlens = cache_seqlens_.const_data_ptr<int32_t>(),
            .cu_seqlens = cu_seqlens_.const_data_ptr<int32_t>(),
            .lanes = block_table_.size(0),
            .max_blocks = block_table_.size(1),
            .block_size = block_size_,
            .num_blocks = num_blocks_};
  }

 private:
  void check_slots(const Checks& check, int64_t tokens) const {
    const Readable cu_seqlens(cu_seqlens_), cache_seqlens(cache_seqlens_), table(block_table_);
    if (!cu_seqlens) {
      return;
    }
    const int64_t lanes = block_table_.size(0), max_blocks = block_table_.size(1);
    const int64_t capacity = max_blocks * block_size_;
    check.cumulative("cu_seqlens", cu_seqlens.data(), lanes, tokens);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t added = cu_seqlens[lane + 1] - cu_seqlens[lane];
      const int64_t begin = cache_seqlens[lane], end = begin + added;
      if (begin < 0 || end > capacity) {
        check.fail("cache_seqlens",
                   str("in [0, ", capacity, " - ", added, " new] at lane ", lane,
                       ", whose capacity is max_blocks * block_size = ", capacity),
                   begin);
      }
      for (int64_t i = begin / block_size_; added > 0 && i * block_size_ < end; ++i) {
        const int32_t block = table[lane * max_blocks + i];
        if (block < 0 || block >= num_blocks_) {
          check.fail("block_table", str("in [0, ", num_blocks_, ") where a token is written"),
                     str(block, " at lane ", lane, ", block ", i));
        }
      }
    }
  }

  int64_t block_size_, num_blocks_;
  Tensor block_table_, cache_seqlens_, cu_seqlens_;
};

inline Tensor new_like(const Tensor& x) {
  return new_tensor(x, {x.size(0), x.size(1), x.size(2)});
}

// ---- the ops, but for the kernels: launch(check, params) runs one ----

template <typename Launch>
std::tuple<Tensor, Tensor> run_rotary(Launch&& launch, const Tensor& query, const Tensor& key,
                                      const Tensor& cos, const Tensor& sin,
                                      const Tensor& positions) {
  const Checks check("rotary");
  check_rotary(check, query, key, cos, sin, positions);
  const DenseTable table(check, query, cos, sin, positions);

  const Tensor rows_q = dense_inner(query, 1), rows_k = dense_inner(key, 1);
  Tensor query_out = new_like(query), key_out = new_like(key);
  const RotaryParams params{.query = heads_of(rows_q),
                            .key = heads_of(rows_k),
                            .query_out = query_out.mutable_data_ptr(),
                            .key_out = key_out.mutable_data_ptr(),
                            .table = table.view(),
                            .tokens = query.size(0),
                            .head_dim = query.size(2),
                            .dtype = dtype_of(query)};
  launch(check, params);
  return {query_out, key_out};
}

template <typename Launch>
void run_kv_append(Launch&& launch, const Tensor& key, const Tensor& value, const Tensor& key_cache,
                   const Tensor& value_cache, const Tensor& block_table,
                   const Tensor& cache_seqlens, const Tensor& cu_seqlens) {
  const Checks check("kv_append");
  check_append(check, key, value, key_cache, value_cache, block_table, cache_seqlens, cu_seqlens);
  const DenseLanes lanes(check, key_cache, key.size(0), block_table, cache_seqlens, cu_seqlens);

  const Tensor rows_k = dense_inner(key, 1), rows_v = dense_inner(value, 1);
  const KvAppendParams params{.key = heads_of(rows_k),
                              .value = heads_of(rows_v),
                              .key_cache = blocks_of(key_cache),
                              .value_cache = blocks_of(value_cache),
                              .lanes = lanes.view(),
                              .tokens = key.size(0),
                              .head_dim = key.size(2),
                              .element_bytes = static_cast<int64_t>(key.element_size())};
  launch(check, params);
}

template <typename Launch>
Tensor run_rotary_kv_append(Launch&& launch, const Tensor& query, const Tensor& key,
                            const Tensor& value, const Tensor& cos, const Tensor& sin,
                            const Tensor& positions, const Tensor& key_cache,
                            const Tensor& value_cache, const Tensor& block_table,
                            const Tensor& cache_seqlens, const Tensor& cu_seqlens) {
  const Checks check("rotary_kv_append");
  check_rotary(check, query, key, cos, sin, positions);
  check_append(check, key, value, key_cache, value_cache, block_table, cache_seqlens, cu_seqlens);
  const DenseTable table(check, query, cos, sin, positions);
  const DenseLanes lanes(check, key_cache, key.size(0), block_table, cache_seqlens, cu_seqlens);

  const Tensor rows_q = dense_inner(query, 1), rows_k = dense_inner(key, 1),
               rows_v = dense_inner(value, 1);
  Tensor query_out = new_like(query);
  const RotaryKvAppendParams params{.query = heads_of(rows_q),
                                    .key = heads_of(rows_k),
                                    .value = heads_of(rows_v),
                                    .query_out = query_out.mutable_data_ptr(),
                                    .table = table.view(),
                                    .key_cache = blocks_of(key_cache),
                                    .value_cache = blocks_of(value_cache),
                                    .lanes = lanes.view(),
                                    .tokens = query.size(0),
                                    .head_dim = query.size(2),
                                    .dtype = dtype_of(query)};
  launch(check, params);
  return query_out;
}

MOR_DECLARE_CPU_KERNEL(rotary, RotaryParams)
MOR_DECLARE_CPU_KERNEL(kv_append, KvAppendParams)
MOR_DECLARE_CPU_KERNEL(rotary_kv_append, RotaryKvAppendParams)

}  // namespace mor
