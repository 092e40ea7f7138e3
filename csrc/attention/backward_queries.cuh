// Gradients of queries: a block takes one tile of rows and walks the keys, as in the forward pass.
#pragma once

#include <utility>

#include "attention/backward_common.cuh"
#include "attention/launch.h"

namespace mor::cuda {

template <typename T, int kDim_>
struct BackwardQueriesTraits {
  static constexpr int kDim = kDim_;
  static constexpr int kRowBytes = kDim * static_cast<int>(sizeof(T));
  static constexpr int kWarps = kRowBytes == 1024 ? 2 : 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kRowTiles = kDim <= 128 && sizeof(T) == 2 ? 2 : 1;  // of a warp
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kKeys = kRowBytes == 128 ? 64 : kRowBytes == 256 ? 32 : 16;
  static constexpr int kStages = kRowBytes == 1024 ? 1 : 2;

  using Rows = Tile<T, kRows, kDim>;
  using Keys = Tile<T, kStages * kKeys, kDim>;
  using Products = float[kRowTiles][kKeys / 8][4];  // of a warp
  using Gradients = float[kRowTiles][kDim / 8][4];
  static constexpr int64_t kSharedBytes =
      2 * Rows::kBytes + 2 * Keys::kBytes + shared_bytes<BackwardRow>(kRows);
  static_assert(kSharedBytes <= 99 << 10);
};

// Grid: (tiles of rows of all sequences, KV heads); tiles past the last one do nothing.
template <typename T, int kDim>
__global__ void __launch_bounds__(BackwardQueriesTraits<T, kDim>::kThreads, 2)
    attention_bwd_queries(const __grid_constant__ AttentionBwdParams bwd,
                          const BackwardRow* all_states) {
  using Traits = BackwardQueriesTraits<T, kDim>;
  constexpr int kKeys = Traits::kKeys;
  const AttentionParams& p = bwd.forward;
  const auto group = static_cast<int32_t>(p.heads / p.kv_heads);
  int64_t tile = block_index().x;
  const auto tiles_of = [&](int64_t b) {
    return ceil_div(int64_t{length_at(p.cu_seqlens_q, b, p.total_q)} * group, Traits::kRows);
  };
  const int64_t b = find_sequence(p.batch, tile, tiles_of);
  if (b < 0) {
    return;
  }
  const Sequence seq(p, b, static_cast<int32_t>(block_index().y));
  // The last tile first: under a causal mask it has the most to do.
  const auto row0 = static_cast<int32_t>((tiles_of(b) - 1 - tile) * Traits::kRows);
  const int32_t rows = seq.rows() - row0 < Traits::kRows ? seq.rows() - row0 : Traits::kRows;
  const int32_t keys = seq.limit(p, row0 + rows - 1);  // that any row sees

  SharedArena arena;
  const auto query = Traits::Rows::take(arena), grad_out = Traits::Rows::take(arena);
  const auto key = Traits::Keys::take(arena), value = Traits::Keys::take(arena);
  const Shared<BackwardRow> states = arena.take<BackwardRow>(Traits::kRows);

  const auto head_dim = static_cast<int>(p.head_dim);
  load_tile<Traits::kRows, Traits::kThreads>(
      query, 0, rows, head_dim, [&](int r) { return seq.row_of<T>(p.query, row0 + r); });
  load_tile<Traits::kRows, Traits::kThreads>(
      grad_out, 0, rows, head_dim, [&](int r) { return seq.row_of<T>(bwd.grad_out, row0 + r); });
  load_states<Traits::kRows, Traits::kThreads>(
      states, all_states + (first_state(p, seq) + seq.first_token * seq.group + row0), rows);
  const auto load_keys = [&](int32_t key0, int place) {
    load_tiles<kKeys, Traits::kThreads>(key, value, place, keys - key0, head_dim, [&](int j) {
      const auto row = static_cast<uint32_t>(seq.first_key + key0 + j);
      return std::pair(row_at<T>(p.kv.key, row, seq.kv_head),
                       row_at<T>(p.kv.value, row, seq.kv_head));
    });
  };

  const int warp_row = thread_index() / kWarpSize * Traits::kWarpRows;
  const Weights<T> to_weights(p.softmax_scale);
  typename Traits::Gradients grad_query = {};
  walk<kKeys, Traits::kStages>(0, keys, load_keys, [&](int32_t key0, int place) {
    typename Traits::Products weights, grad;
    multiply_rows(weights, query, warp_row, key, place);
    multiply_rows(grad, grad_out, warp_row, value, place);
    const auto state = [&](int i, int, int e) -> BackwardRow {
      return states[warp_row + accumulator_row(i, e)];
    };
    const auto key_of = [&](int, int j, int e) { return key0 + accumulator_column(j, e); };
    const BackwardRow first = states[warp_row];
    if (first.limit < key0 + kKeys) {
      softmax_backward<true>(weights, grad, to_weights, state, key_of);
    } else {
      softmax_backward<false>(weights, grad, to_weights, state, key_of);
    }
    multiply_accumulators(grad_query, grad, key, place);
  });

  const auto factor = static_cast<float>(p.softmax_scale);
  stage_rows(query, warp_row, grad_query, [&](int, int) { return factor; });
  store_rows(query, warp_row, Traits::kWarpRows, head_dim, [&](int r) -> T* {
    // Where sequences overlap, against the rules, a state may be anything: write nowhere else.
    const BackwardRow row = states[warp_row + r];
    const bool inside = warp_row + r < rows && row.row >= 0 && row.row < p.total_q * p.heads;
    return inside ? static_cast<T*>(bwd.grad_query) + row.row * p.head_dim : nullptr;
  });
}

template <typename T, int kDim>
cudaError_t backward_queries(const AttentionBwdParams& bwd, const BackwardRow* states,
                             cudaStream_t stream) {
  using Traits = BackwardQueriesTraits<T, kDim>;
  const AttentionParams& p = bwd.forward;
  const int64_t rows = p.total_q * (p.heads / p.kv_heads);
  const int64_t tiles = rows / Traits::kRows + (p.batch < rows ? p.batch : rows);
  return launch("attention_bwd_queries", attention_bwd_queries<T, kDim>,
                {{static_cast<uint32_t>(tiles), static_cast<uint32_t>(p.kv_heads), 1},
                 Traits::kThreads,
                 Traits::kSharedBytes},
                stream, bwd, states);
}

}  // namespace mor::cuda
