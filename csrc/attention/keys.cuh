// Where the keys and values of a sequence lie, packed or paged, and how a warp copies some of them.
//
// Both kinds are made for the keys that are worked on, those before `end`. find(first) gives the
// place of the warp's keys from first on; it may read device memory, so it is called some time
// before load. All lanes of a warp call these together.
#pragma once

#include "attention/sequence.cuh"
#include "attention/split.cuh"
#include "attention/tile.cuh"

namespace mor::cuda {

// Where a row of head_dim elements begins, from some base.
struct RowOffset {
  int64_t elements;  // 16-byte aligned, whatever it is
  bool exists;
};

// Starts copies into rows [first, first + kCount) of a tile, by one warp; first is a multiple of 8.
// row(i) says where row first + i comes from; where none exists, and past head_dim, zeros. All
// lanes call row together.
template <int kCount, typename T, int kRows, int kDim, typename Row>
__device__ void load_rows(const Tile<T, kRows, kDim>& tile, int first, int64_t head_dim,
                          const void* base, Row&& row) {
  constexpr int kChunks = Tile<T, kRows, kDim>::kChunks;
  static_assert(kCount * kChunks % kWarpSize == 0);
  const Shared<T> to = tile.data + first * kDim;
#pragma unroll 4
  for (int i = 0; i < kCount * kChunks / kWarpSize; ++i) {
    const int chunk = (i * kWarpSize + lane_index()) % kChunks;
    const int r = (i * kWarpSize + lane_index()) / kChunks;
    const RowOffset from = row(r);
    copy_async(to + tile.offset(r, chunk),
               static_cast<const T*>(base) + chunk * kVector16<T> + from.elements,
               from.exists && chunk * kVector16<T> < head_dim);
  }
}

class PackedKeys {
 public:
  struct Place {};

  // How many of a sequence's rows the forward kernel works on.
  __device__ static int64_t forward_rows(int64_t rows, int64_t) { return rows; }

  __device__ PackedKeys(const AttentionParams& p, const Sequence& seq, int32_t end)
      : p_(p), first_key_(seq.first_key), kv_head_(seq.kv_head), end_(end) {}

  __device__ Place find(int32_t) const { return {}; }

  // Starts copies of the warp's keys and values [first, first + kCount) into rows from `row` on of
  // the tiles, zeros where they are past the end.
  template <int kCount, typename Tile>
  __device__ void load(const Tile& key, const Tile& value, int row, int32_t first, Place) const {
    const auto load_from = [&](const HeadRows& source, const Tile& tile) {
      load_rows<kCount>(tile, row, p_.head_dim, source.data, [&](int i) {
        return RowOffset{
            (first_key_ + first + i) * source.row_stride + kv_head_ * source.head_stride,
            first + i < end_};
      });
    };
    load_from(p_.kv.key, key);
    load_from(p_.kv.value, value);
  }

 private:
  const AttentionParams& p_;
  int64_t first_key_;
  int32_t kv_head_, end_;
};

class PagedKeys {
 public:
  struct Place {
    int32_t block;  // of key first + lane_index(); -1 for none
  };

  // Lanes of few rows are left to the decode kernel.
  __device__ static int64_t forward_rows(int64_t rows, int64_t group) {
    return rows > decode_rows(group) ? rows : 0;
  }

  __device__ PagedKeys(const AttentionParams& p, const Sequence& seq, int32_t end)
      : p_(p),
        table_(p.kv.block_table + seq.batch_index * p.kv.max_blocks),
        block_size_(static_cast<uint32_t>(p.kv.block_size < kMaxKeys ? p.kv.block_size : kMaxKeys)),
        kv_head_(seq.kv_head),
        end_(end) {}

  __device__ Place find(int32_t first) const {
    const int32_t j = first + lane_index();
    return {j < end_ ? table_[static_cast<uint32_t>(j) / block_size_] : -1};
  }

  template <int kCount, typename Tile>
  __device__ void load(const Tile& key, const Tile& value, int row, int32_t first,
                       Place place) const {
    const bool exists = place.block >= 0 && place.block < p_.kv.num_blocks;
    const uint32_t rows_exist = ballot(exists);
    const uint32_t row_in_block = static_cast<uint32_t>(first + lane_index()) % block_size_;
    const auto load_from = [&](const HeadRows& source, int64_t block_stride, const Tile& tile) {
      const int64_t own = exists ? place.block * block_stride + row_in_block * source.row_stride +
                                       kv_head_ * source.head_stride
                                 : 0;
      load_rows<kCount>(tile, row, p_.head_dim, source.data, [&](int i) {
        return RowOffset{shuffle(own, i), (rows_exist >> i & 1) != 0};
      });
    };
    load_from(p_.kv.key, p_.kv.key_block_stride, key);
    load_from(p_.kv.value, p_.kv.value_block_stride, value);
  }

 private:
  static constexpr int64_t kMaxKeys = std::numeric_limits<int32_t>::max();

  const AttentionParams& p_;
  const int32_t* table_;  // of the lane
  uint32_t block_size_;
  int32_t kv_head_, end_;
};

}  // namespace mor::cuda
