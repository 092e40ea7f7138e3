// One (sequence, KV head) pair as the attention kernels see it, and which of them a block works on.
//
// As on the CPU (cpu_sequence.h) the queries of a KV head's whole group are one list of rows, token
// by token: row r is head r % group of token r / group. Limits do not decrease along it, and a tile
// of rows reads the keys once for the whole group.
#pragma once

#include "attention/params.h"
#include "common/launch.cuh"

namespace mor::cuda {

// cu_seqlens[b] with whatever lies in device memory made harmless.
__device__ inline int32_t offset_at(const int32_t* cu_seqlens, int64_t b, int64_t total) {
  const int64_t offset = cu_seqlens[b];
  return static_cast<int32_t>(offset < 0 ? 0 : offset > total ? total : offset);
}

__device__ inline int32_t length_at(const int32_t* cu_seqlens, int64_t b, int64_t total) {
  const int32_t length = offset_at(cu_seqlens, b + 1, total) - offset_at(cu_seqlens, b, total);
  return length < 0 ? 0 : length;
}

// Tile `tile` of all tiles, tiles(b) of them in sequence b, from sequence `first` on: finds its
// sequence and its number there. All lanes of a warp call it together. Returns -1 if there are not
// so many.
template <typename Tiles>
__device__ int64_t find_sequence(int64_t batch, int64_t& tile, Tiles&& tiles, int64_t first = 0) {
  for (int64_t b0 = first; b0 < batch; b0 += kWarpSize) {
    const int64_t b = b0 + lane_index();
    const int64_t own = b < batch ? tiles(b) : 0;
    const int64_t end = warp_inclusive_scan(own);
    const uint32_t beyond = ballot(end > tile);
    if (beyond != 0) {
      const int lane = lowest_bit(beyond);
      tile -= shuffle(end - own, lane);
      return b0 + lane;
    }
    tile -= shuffle(end, kWarpSize - 1);
  }
  return -1;
}

struct Sequence {
  int64_t batch_index;
  int32_t first_token, tokens, first_key, keys, group, kv_head;

  __device__ Sequence(const AttentionParams& p, int64_t b, int32_t head)
      : batch_index(b),
        first_token(offset_at(p.cu_seqlens_q, b, p.total_q)),
        tokens(length_at(p.cu_seqlens_q, b, p.total_q)),
        group(static_cast<int32_t>(p.heads) / static_cast<int32_t>(p.kv_heads)),
        kv_head(head) {
    if (p.kv.cu_seqlens != nullptr) {
      first_key = offset_at(p.kv.cu_seqlens, b, p.kv.total_keys);
      keys = length_at(p.kv.cu_seqlens, b, p.kv.total_keys);
    } else {
      const int64_t capacity = p.kv.max_blocks * p.kv.block_size, held = p.kv.seqlens[b];
      first_key = 0;
      keys = static_cast<int32_t>(held < 0 ? 0 : held > capacity ? capacity : held);
    }
  }

  __device__ int32_t rows() const { return tokens * group; }
  __device__ int64_t token(int32_t row) const { return first_token + row / group; }
  __device__ int64_t head(int32_t row) const { return int64_t{kv_head} * group + row % group; }

  // How many keys a row sees; 0 past the last row.
  __device__ int32_t limit(const AttentionParams& p, int32_t row) const {
    if (row >= rows()) {
      return 0;
    }
    const int32_t limit =
        p.key_limit != nullptr ? p.key_limit[token(row)] : keys - tokens + row / group + 1;
    return limit < 0 ? 0 : limit > keys ? keys : limit;
  }

  // The first row that sees more than key keys; rows() if none does.
  __device__ int32_t first_row_beyond(const AttentionParams& p, int32_t key) const {
    int32_t low = 0, high = tokens;
    while (low < high) {
      const int32_t middle = low + (high - low) / 2;
      if (limit(p, middle * group) > key) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low * group;
  }

  // A row of a tensor [total_q, heads, head_dim].
  __device__ int64_t offset_of(const HeadRows& tensor, int32_t row) const {
    return token(row) * tensor.row_stride + head(row) * tensor.head_stride;
  }
  template <typename T>
  __device__ const T* row_of(const HeadRows& tensor, int32_t row) const {
    return static_cast<const T*>(tensor.data) + offset_of(tensor, row);
  }
};

// What a block keeps in shared memory of each row of its tile, so that nothing of it takes
// registers while keys are worked on.
struct RowInfo {
  int32_t token, head, limit;  // token: -1 past the last row
};

class RowTable {
 public:
  static constexpr int64_t bytes(int rows) { return shared_bytes<Vector<int32_t, 4>>(rows); }

  __device__ RowTable(SharedArena& arena, int rows) : rows_(arena.take<Vector<int32_t, 4>>(rows)) {}

  // For row row0 + i of the sequence; a barrier must follow.
  __device__ void fill(const AttentionParams& p, const Sequence& seq, int32_t row0, int i) const {
    const int32_t row = row0 + i;
    const bool inside = row < seq.rows();
    rows_[i] = Vector<int32_t, 4>{inside ? static_cast<int32_t>(seq.token(row)) : -1,
                                  static_cast<int32_t>(seq.head(row)), seq.limit(p, row), 0};
  }

  __device__ RowInfo operator[](int i) const {
    const Vector<int32_t, 4> row = rows_[i];
    return {row[0], row[1], row[2]};
  }

 private:
  Shared<Vector<int32_t, 4>> rows_;
};

// Keys or values of a sequence, one after the other.
template <typename T>
struct PackedRows {
  const T* first;
  int64_t stride;

  __device__ PackedRows(const HeadRows& tensor, const Sequence& seq)
      : first(static_cast<const T*>(tensor.data) + seq.first_key * tensor.row_stride +
              seq.kv_head * tensor.head_stride),
        stride(tensor.row_stride) {}

  __device__ const T* operator()(int32_t j) const { return first + j * stride; }
};

}  // namespace mor::cuda
