// Argument checks of the kv_cache family, shared by all devices.
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

MOR_DECLARE_CPU_KERNEL(rotary, RotaryParams)
MOR_DECLARE_CPU_KERNEL(kv_append, KvAppendParams)
MOR_DECLARE_CPU_KERNEL(rotary_kv_append, RotaryKvAppendParams)

}  // namespace mor
