// How paged_attention splits the keys of lanes with few rows, and where the results of the pieces
// are kept until they are combined.
//
// A lane's split follows from the lane alone, never from the batch or the device, and so do the
// bits of its results.
#pragma once

#include <algorithm>

#include "attention/sequence.cuh"
#include "attention/softmax.cuh"

namespace mor::cuda {

inline constexpr int32_t kDecodeTileRows = 16;  // what one product of a warp takes
inline constexpr uint32_t kMinPieceKeys = 128;
inline constexpr uint32_t kPieceStep = 64;  // at least what a block works on at once

// Lanes of at most this many rows are decoded, their keys split; a single token always is.
constexpr int64_t decode_rows(int64_t group) {
  return group > 64 ? group : 64;
}

// How many pieces the keys of a tile of rows give at most: about 256 over all KV heads, which fills
// a large device, within what is cheap to combine.
constexpr int32_t max_pieces(int64_t kv_heads) {
  return kv_heads <= 4 ? 64 : kv_heads >= 16 ? 16 : 256 / static_cast<int32_t>(kv_heads);
}

// One lane; without tiles of rows if it is not to be decoded. The more there are, the fewer pieces
// each has.
struct LaneSplit {
  int32_t row_tiles = 0, pieces = 0;
  uint32_t piece_keys = 0;

  __device__ LaneSplit(const AttentionParams& p, int64_t lane) {
    const Sequence seq(p, lane, 0);
    const int32_t rows = seq.rows();
    if (rows == 0 || rows > decode_rows(seq.group)) {
      return;
    }
    row_tiles = ceil_div(rows, kDecodeTileRows);
    const int32_t most = max_pieces(p.kv_heads) / row_tiles;
    const auto keys = static_cast<uint32_t>(seq.limit(p, rows - 1));  // that any row sees
    const uint32_t fair = ceil_div(keys, static_cast<uint32_t>(most > 1 ? most : 1));
    piece_keys = ceil_div(fair > kMinPieceKeys ? fair : kMinPieceKeys, kPieceStep) * kPieceStep;
    pieces = keys == 0 ? 1 : static_cast<int32_t>(ceil_div(keys, piece_keys));
  }
};

// For each row and piece of the lanes that are split: the sum of weighted values, and what is known
// of the weights. Room is kept for each token or for each lane, whichever takes less; the other
// stride is 0.
struct PieceResults {
  float* out;        // [kv_heads, head_stride, head_dim]
  RowState* states;  // [kv_heads, head_stride]
  int64_t head_stride, token_stride, lane_stride;

  __device__ int64_t index(const Sequence& seq, int32_t row, int32_t pieces, int32_t piece) const {
    return seq.kv_head * head_stride + seq.first_token * token_stride +
           seq.batch_index * lane_stride + int64_t{row} * pieces + piece;
  }
};

struct PagedParams : AttentionParams {
  PieceResults results;
};

// The most pieces that a lane can have.
inline int64_t pieces_bound(const AttentionParams& p) {
  const int64_t most = max_pieces(p.kv_heads);
  const int64_t longest = ceil_div(p.kv.max_blocks * p.kv.block_size, kMinPieceKeys);
  return std::min(std::max<int64_t>(longest, 1), most);
}

// scratch: null to learn the strides only, which are 0 if no lane can be split.
inline PieceResults results_in(float* scratch, const AttentionParams& p) {
  const int64_t pieces = pieces_bound(p), group = p.heads / p.kv_heads;
  if (pieces == 1) {
    return {};
  }
  // Rows times pieces of a lane: a tile at most max_pieces each, and more tiles together no more.
  const int64_t tiles = ceil_div(decode_rows(group), kDecodeTileRows);
  const int64_t of_lane =
      kDecodeTileRows * std::min<int64_t>(max_pieces(p.kv_heads), tiles * pieces);
  const int64_t of_token = group * pieces;
  const bool by_token = p.total_q * of_token < p.batch * of_lane;
  PieceResults results{};
  results.head_stride = by_token ? p.total_q * of_token : p.batch * of_lane;
  results.token_stride = by_token ? of_token : 0;
  results.lane_stride = by_token ? 0 : of_lane;
  results.out = scratch;
  results.states =
      reinterpret_cast<RowState*>(scratch + p.kv_heads * results.head_stride * p.head_dim);
  return results;
}

}  // namespace mor::cuda
