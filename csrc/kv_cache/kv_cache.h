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

// The accumulate type as a dtype.
inline ScalarType table_dtype(const Tensor& query) {
  const bool fp64 = query.scalar_type() == ScalarType::Double;
  return fp64 ? ScalarType::Double : ScalarType::Float;
}

// query [N, query_heads, head_dim], key [N, kv_heads, head_dim] and their table.
inline void check_rotary(const Checks& check, const Tensor& query, const Tensor& key,
                         const Tensor& cos, const Tensor& sin, const Tensor& positions) {
  check.dims("query", query, 3);
  check.floating("query", query);
  check.shape("key", key, {query.size(0), -1, query.size(2)}, "[N, kv_heads, head_dim]");
  check.dtype("key", key, query.scalar_type());
  const int64_t head_dim = query.size(2);
  check.require(head_dim % 2 == 0, "query", "of even head_dim", head_dim);
  check.shape("cos", cos, {-1, head_dim / 2}, "[max_positions, head_dim / 2]");
  check.shape("sin", sin, {cos.size(0), head_dim / 2}, "[max_positions, head_dim / 2]");
  if (cos.scalar_type() != ScalarType::Float) {
    check.dtype("cos", cos, table_dtype(query));
  }
  check.dtype("sin", sin, cos.scalar_type());
  check.int32("positions", positions);
  check.shape("positions", positions, {query.size(0)}, "[N]");
}

// A cache is written in place, so a layout that the kernels cannot walk is an error, not a copy.
inline void check_cache(const Checks& check, const char* argument, const Tensor& cache,
                        const Tensor& key) {
  check.shape(argument, cache, {-1, -1, key.size(1), key.size(2)},
              "[num_blocks, block_size, kv_heads, head_dim]");
  check.dtype(argument, cache, key.scalar_type());
  check.require(cache.size(1) > 0, argument, "of block_size >= 1", shape_str(cache));
  const bool dense_entries = (cache.size(3) == 1 || cache.stride(3) == 1) &&
                             (cache.size(2) == 1 || cache.stride(2) == cache.size(3));
  check.require(dense_entries, argument, "contiguous in its last two dimensions",
                str("strides ", cache.stride(2), " and ", cache.stride(3)));
  const bool expanded =
      (cache.size(0) > 1 && cache.stride(0) == 0) || (cache.size(1) > 1 && cache.stride(1) == 0);
  check.require(!expanded, argument, "of distinct elements", "an expanded tensor");
}

// key and value [N, kv_heads, head_dim], the caches, and the tables of the lanes.
inline void check_append(const Checks& check, const Tensor& key, const Tensor& value,
                         const Tensor& key_cache, const Tensor& value_cache,
                         const Tensor& block_table, const Tensor& cache_seqlens,
                         const Tensor& cu_seqlens) {
  check.dims("key", key, 3);
  check.floating("key", key);
  check.shape("value", value, {key.size(0), key.size(1), key.size(2)}, "[N, kv_heads, head_dim]");
  check.dtype("value", value, key.scalar_type());
  check_cache(check, "key_cache", key_cache, key);
  check_cache(check, "value_cache", value_cache, key);
  check.require(
      value_cache.size(0) == key_cache.size(0) && value_cache.size(1) == key_cache.size(1),
      "value_cache", "of the shape of key_cache", shape_str(value_cache));
  check.int32("cu_seqlens", cu_seqlens);
  check.require(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, "cu_seqlens",
                "of shape [lanes + 1]", shape_str(cu_seqlens));
  const int64_t lanes = cu_seqlens.size(0) - 1;
  check.int32("cache_seqlens", cache_seqlens);
  check.shape("cache_seqlens", cache_seqlens, {lanes}, "[lanes]");
  check.int32("block_table", block_table);
  check.shape("block_table", block_table, {lanes, -1}, "[lanes, max_blocks]");
}

MOR_DECLARE_CPU_KERNEL(rotary, RotaryParams)
MOR_DECLARE_CPU_KERNEL(kv_append, KvAppendParams)
MOR_DECLARE_CPU_KERNEL(rotary_kv_append, RotaryKvAppendParams)

}  // namespace mor
