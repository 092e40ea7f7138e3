// Flash attention forward (FlashAttention-2, arXiv 2307.08691, algorithm 1), over packed sequences
// and, where a lane has many rows, over a paged cache.
//
// A block takes one tile of rows of a (sequence, KV head) and walks the tiles of keys that its last
// row sees; keys and values of the next tile are copied while this one is worked on, one barrier a
// tile. A warp owns whole rows, and copies its share of the keys.
#pragma once

#include "attention/keys.cuh"
#include "attention/launch.h"
#include "attention/softmax.cuh"

namespace mor::cuda {

// kDim: head_dim, padded. The sizes keep a block under 99 KiB of shared memory (what sm_86 has) and
// the accumulators in registers.
template <typename T, int kDim_>
struct ForwardTraits {
  static constexpr int kDim = kDim_;
  static constexpr bool kFloat = sizeof(T) == 4;
  static constexpr int kWarps = kFloat && kDim == 256 ? 2 : 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kRowTiles = kDim * static_cast<int>(sizeof(T)) <= 256 ? 2 : 1;  // of a warp
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kKeys = kFloat ? (kDim == 256 ? 16 : 32) : (kDim == 256 ? 32 : 64);
  static constexpr int kStages = 2;

  using Rows = Tile<T, kRows, kDim>;
  using Keys = Tile<T, kStages * kKeys, kDim>;
  static constexpr int64_t kSharedBytes = Rows::kBytes + 2 * Keys::kBytes + RowTable::bytes(kRows);
  static_assert(kSharedBytes <= 99 << 10);
};

// Keys: PackedKeys or PagedKeys. Grid: (tiles of rows of all sequences, KV heads); tiles past the
// last one do nothing.
template <typename T, int kDim, typename Keys>
__global__ void __launch_bounds__(ForwardTraits<T, kDim>::kThreads, 2)
    attention_forward(const __grid_constant__ AttentionParams p,
                      const __grid_constant__ ScoreScale scale) {
  using Traits = ForwardTraits<T, kDim>;
  constexpr int kRowTiles = Traits::kRowTiles, kKeys = Traits::kKeys;
  constexpr int kShare = kKeys / Traits::kWarps;  // of a tile of keys, a warp's
  const auto group = static_cast<int32_t>(p.heads / p.kv_heads);
  int64_t tile = block_index().x;
  const auto tiles_of = [&](int64_t b) {
    const int64_t rows = int64_t{length_at(p.cu_seqlens_q, b, p.total_q)} * group;
    return ceil_div(Keys::forward_rows(rows, group), Traits::kRows);
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
  const auto query = Traits::Rows::take(arena);
  const auto key = Traits::Keys::take(arena), value = Traits::Keys::take(arena);
  const RowTable table(arena, Traits::kRows);
  for (int i = thread_index(); i < Traits::kRows; i += Traits::kThreads) {
    table.fill(p, seq, row0, i);
  }
  const auto head_dim = static_cast<int>(p.head_dim);
  const int warp = thread_index() / kWarpSize;
  const Keys source(p, seq, keys);
  const auto load_share = [&](int32_t key0, int first, typename Keys::Place place) {
    source.template load<kShare>(key, value, first + warp * kShare, key0 + warp * kShare, place);
  };
  auto place = source.find(warp * kShare);
  load_tile<Traits::kRows, Traits::kThreads>(
      query, 0, rows, head_dim, [&](int r) { return seq.row_of<T>(p.query, row0 + r); });
  if (keys > 0) {
    load_share(0, 0, place);
  }
  copy_async_commit();
  place = source.find(kKeys + warp * kShare);

  const int warp_row = warp * Traits::kWarpRows;
  Softmax<kRowTiles> softmax;
  float out[kRowTiles][kDim / 8][4] = {};
  for (int32_t key0 = 0; key0 < keys; key0 += kKeys) {
    const int first = key0 & kKeys;  // row of the tiles of keys and values where these begin
    copy_async_wait<0>();
    sync_threads();  // these keys are there, and nobody reads those that are overwritten next
    if (key0 + kKeys < keys) {
      load_share(key0 + kKeys, first ^ kKeys, place);
      copy_async_commit();
    }
    float scores[kRowTiles][kKeys / 8][4];
    multiply_rows(scores, query, warp_row, key, first);
    scale.prepare(scores);
    if (key0 + kKeys > table[warp_row].limit) {
      mask_scores(scores, key0, [&](int i, int half) {
        return table[warp_row + accumulator_row(i, 2 * half)].limit;
      });
    }
    softmax.template update<Traits::kFloat>(scores, out, scale.factor);
    place = source.find(key0 + 2 * kKeys + warp * kShare);  // while the product runs
    multiply_accumulators(out, scores, value, first);
  }
  copy_async_wait<0>();
  sync_threads();  // the table is there, even if there were no keys
  softmax.finish();

  for_each_row<kRowTiles>([&](int i, int half) {
    const RowInfo row = table[warp_row + accumulator_row(i, 2 * half)];
    if (row.token >= 0 && lane_index() % 4 == 0) {
      static_cast<float*>(p.lse)[row.head * p.total_q + row.token] =
          softmax.state(i, half).lse(scale.factor);
    }
  });
  stage_rows(query, warp_row, out,
             [&](int i, int half) { return softmax.state(i, half).inverse_sum(); });
  store_rows(query, warp_row, Traits::kWarpRows, head_dim, [&](int r) -> T* {
    const RowInfo row = table[warp_row + r];
    T* target = static_cast<T*>(p.out) + (row.token * p.heads + row.head) * p.head_dim;
    return row.token < 0 ? nullptr : target;
  });
}

template <typename T, int kDim, typename Keys>
cudaError_t launch_forward(const AttentionParams& p, cudaStream_t stream) {
  using Traits = ForwardTraits<T, kDim>;
  const int64_t rows = p.total_q * (p.heads / p.kv_heads);
  const int64_t tiles = rows / Traits::kRows + (p.batch < rows ? p.batch : rows);
  return launch("attention_forward", attention_forward<T, kDim, Keys>,
                {{static_cast<uint32_t>(tiles), static_cast<uint32_t>(p.kv_heads), 1},
                 Traits::kThreads,
                 Traits::kSharedBytes},
                stream, p, ScoreScale(p.softmax_scale));
}

template <typename T>
cudaError_t attention_of(const AttentionParams& p, cudaStream_t stream) {
  return dispatch_head_dim(
      p.head_dim, [&]<int kDim>() { return launch_forward<T, kDim, PackedKeys>(p, stream); });
}

}  // namespace mor::cuda
