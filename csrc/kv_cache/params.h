// What the host hands to the kernels of the kv_cache family, the same on every device.
#pragma once

#include "common/types.h"

namespace mor {

// [tokens, heads, head_dim] with dense head_dim; strides in elements.
struct Heads {
  const void* data;
  int64_t heads, token_stride, head_stride;
};

// cos and sin are of the accumulate type: [max_positions, head_dim / 2] with dense rows.
struct RotaryTable {
  const void *cos, *sin;
  int64_t cos_stride, sin_stride, max_positions;
  const int32_t* positions;  // [tokens], in [0, max_positions)
};

// [num_blocks, block_size, heads, head_dim] with dense entries; strides in elements.
struct CacheBlocks {
  void* data;
  int64_t block_stride, entry_stride;
};

// The lanes' lists of entries: token j of lane s is entry cache_seqlens[s] + j of the lane.
struct Lanes {
  const int32_t* block_table;    // [lanes, max_blocks]
  const int32_t* cache_seqlens;  // [lanes]
  const int32_t* cu_seqlens;     // [lanes + 1]
  int64_t lanes, max_blocks, block_size, num_blocks;
};

struct RotaryParams {
  Heads query, key;
  void *query_out, *key_out;  // [tokens, heads, head_dim], contiguous
  RotaryTable table;
  int64_t tokens, head_dim;
  DType dtype;
};

struct KvAppendParams {
  Heads key, value;
  CacheBlocks key_cache, value_cache;
  Lanes lanes;
  int64_t tokens, head_dim, element_bytes;
};

struct RotaryKvAppendParams {
  Heads query, key, value;
  void* query_out;  // [tokens, heads, head_dim], contiguous
  RotaryTable table;
  CacheBlocks key_cache, value_cache;
  Lanes lanes;
  int64_t tokens, head_dim;
  DType dtype;
};

}  // namespace mor
