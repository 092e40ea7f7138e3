// One (sequence, KV head) pair as the attention kernels see it.
//
// The queries of a KV head's whole group are one list of rows, token by token: row r is head
// r % group of token r / group. Limits do not decrease along it, and a tile of rows reuses the
// packed keys for the whole group, in prefill and in decode alike.
#pragma once

#include <algorithm>

#include "attention/params.h"
#include "common/types.h"

namespace mor::MOR_ISA {

inline int64_t ceil_div(int64_t value, int64_t divisor) {
  return (value + divisor - 1) / divisor;
}

template <typename T>
class Sequence {
 public:
  Sequence(const AttentionParams& p, int64_t b, int64_t kv_head)
      : p_(p),
        lane_(b),
        group_(p.heads / p.kv_heads),
        first_head_(kv_head * group_),
        kv_head_(kv_head),
        first_token_(p.cu_seqlens_q[b]),
        tokens_(p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b]),
        first_key_(paged() ? 0 : p.kv.cu_seqlens[b]),
        keys_(paged() ? p.kv.seqlens[b] : p.kv.cu_seqlens[b + 1] - p.kv.cu_seqlens[b]) {}

  int64_t rows() const { return tokens_ * group_; }
  int64_t keys() const { return keys_; }
  int64_t first_key() const { return first_key_; }

  // Row in tensors [total_q, heads, ...] and [heads, total_q].
  int64_t token(int64_t row) const { return first_token_ + row / group_; }
  int64_t head(int64_t row) const { return first_head_ + row % group_; }
  int64_t token_major(int64_t row) const { return token(row) * p_.heads + head(row); }
  int64_t head_major(int64_t row) const { return head(row) * p_.total_q + token(row); }

  // How many keys a row sees.
  int64_t limit(int64_t row) const {
    const int64_t limit =
        p_.key_limit != nullptr ? p_.key_limit[token(row)] : keys_ - tokens_ + row / group_ + 1;
    return std::clamp<int64_t>(limit, 0, keys_);
  }

  // The first row that sees more than key keys; rows() if none does.
  int64_t first_row_beyond(int64_t key) const {
    int64_t low = 0, high = tokens_;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (limit(middle * group_) > key) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low * group_;
  }

  const T* at(const HeadRows& tensor, int64_t row) const {
    return static_cast<const T*>(tensor.data) + token(row) * tensor.row_stride +
           head(row) * tensor.head_stride;
  }
  const T* query(int64_t row) const { return at(p_.query, row); }
  const T* key(int64_t j) const { return entry(p_.kv.key, p_.kv.key_block_stride, j); }
  const T* value(int64_t j) const { return entry(p_.kv.value, p_.kv.value_block_stride, j); }

 private:
  // The table may be empty, and its pointer null.
  bool paged() const { return p_.kv.cu_seqlens == nullptr; }

  const T* entry(const HeadRows& tensor, int64_t block_stride, int64_t j) const {
    int64_t offset = (first_key_ + j) * tensor.row_stride;
    if (paged()) {
      const int64_t block = p_.kv.block_table[lane_ * p_.kv.max_blocks + j / p_.kv.block_size];
      offset = block * block_stride + j % p_.kv.block_size * tensor.row_stride;
    }
    return static_cast<const T*>(tensor.data) + offset + kv_head_ * tensor.head_stride;
  }

  const AttentionParams& p_;
  int64_t lane_, group_, first_head_, kv_head_, first_token_, tokens_, first_key_, keys_;
};

}  // namespace mor::MOR_ISA
