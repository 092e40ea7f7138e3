// What the host hands to the kernels of the attention family, the same on every device.
#pragma once

#include "common/types.h"

namespace mor {

// Rows of a tensor [rows, heads, head_dim] with dense head_dim; strides in elements.
struct HeadRows {
  const void* data;
  int64_t row_stride, head_stride;
};

// Keys and values of every sequence: packed (block_table is null), or paged, where a lane's
// entry j is row j % block_size of block block_table[lane][j / block_size].
struct KeyValues {
  HeadRows key, value;
  const int32_t* cu_seqlens;   // [batch + 1], packed only
  int64_t total_keys;          // rows of key and value, packed only
  const int32_t* seqlens;      // [batch], paged only
  const int32_t* block_table;  // [batch, max_blocks], paged only
  int64_t num_blocks, max_blocks, block_size, key_block_stride, value_block_stride;
};

struct AttentionParams {
  HeadRows query;  // [total_q, heads, head_dim]
  KeyValues kv;
  const int32_t* cu_seqlens_q;  // [batch + 1]
  const int32_t* key_limit;     // [total_q], null: causal, aligned to the last key
  void* out;                    // [total_q, heads, head_dim], contiguous
  void* lse;                    // [heads, total_q], accumulate type
  int64_t batch, total_q, heads, kv_heads, head_dim;
  int64_t max_seqlen_q;  // paged only; bounds work, not memory: it may be wrong
  double softmax_scale;
  DType dtype;
};

struct AttentionBwdParams {
  AttentionParams forward;  // out and lse are inputs here
  HeadRows grad_out;        // [total_q, heads, head_dim]
  const void* grad_lse;     // [heads, total_q] or null
  void* grad_query;         // [total_q, heads, head_dim], contiguous like the two below
  void* grad_key;           // [total_k, kv_heads, head_dim]
  void* grad_value;
};

}  // namespace mor
