// Gradients of keys and values.
//
// A block takes one tile of keys of a (sequence, KV head) and walks the tiles of rows from the
// first that sees any of them, over the KV head's whole group. Keys are the rows of its products:
// weights and gradients of scores come out transposed, as the A operands that they are next.
#pragma once

#include <utility>

#include "attention/backward_common.cuh"
#include "attention/launch.h"

namespace mor::cuda {

// kDim: head_dim, padded. As in the forward pass, a block stays under 99 KiB of shared memory and
// its accumulators in registers.
template <typename T, int kDim_>
struct BackwardKeysTraits {
  static constexpr int kDim = kDim_;
  static constexpr int kRowBytes = kDim * static_cast<int>(sizeof(T));
  static constexpr int kWarps = kRowBytes == 1024 ? 2 : kDim == 128 && sizeof(T) == 2 ? 8 : 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kBlocks = kWarps == 8 ? 1 : 2;         // on a multiprocessor, at least
  static constexpr int kKeyTiles = kRowBytes == 128 ? 2 : 1;  // of a warp
  static constexpr int kWarpKeys = 16 * kKeyTiles;
  static constexpr int kKeys = kWarps * kWarpKeys;
  static constexpr int kRows = kRowBytes <= 256 ? 32 : 16;
  static constexpr int kStages = kRowBytes == 1024 ? 1 : 2;
  // Both gradients at once, or a kernel for each: registers do not hold both.
  static constexpr bool kTogether = kDim <= 128;

  using Keys = Tile<T, kKeys, kDim>;
  using Rows = Tile<T, kStages * kRows, kDim>;
  using Products = float[kKeyTiles][kRows / 8][4];  // of a warp
  using Gradients = float[kKeyTiles][kDim / 8][4];
  static constexpr int64_t kSharedBytes =
      2 * Keys::kBytes + 2 * Rows::kBytes + shared_bytes<BackwardRow>(kStages * kRows);
  static_assert(kSharedBytes <= 99 << 10);
};

// Grid: (tiles of keys of all sequences, KV heads); tiles past the last one do nothing.
template <typename T, int kDim, bool kGradKey, bool kGradValue>
__global__ void __launch_bounds__(BackwardKeysTraits<T, kDim>::kThreads,
                                  BackwardKeysTraits<T, kDim>::kBlocks)
    attention_bwd_keys(const __grid_constant__ AttentionBwdParams bwd,
                       const BackwardRow* all_states) {
  using Traits = BackwardKeysTraits<T, kDim>;
  constexpr int kRows = Traits::kRows;
  const AttentionParams& p = bwd.forward;
  int64_t tile = block_index().x;
  const int64_t b = find_sequence(p.batch, tile, [&](int64_t s) {
    return ceil_div(length_at(p.kv.cu_seqlens, s, p.kv.total_keys), Traits::kKeys);
  });
  if (b < 0) {
    return;
  }
  const Sequence seq(p, b, static_cast<int32_t>(block_index().y));
  const auto key0 = static_cast<int32_t>(tile * Traits::kKeys);
  const int32_t seen = seq.tokens == 0 ? 0 : seq.limit(p, seq.rows() - 1);  // by any row

  SharedArena arena;
  const auto key = Traits::Keys::take(arena), value = Traits::Keys::take(arena);
  const auto query = Traits::Rows::take(arena), grad_out = Traits::Rows::take(arena);
  const Shared<BackwardRow> states = arena.take<BackwardRow>(Traits::kStages * kRows);

  const auto head_dim = static_cast<int>(p.head_dim);
  const PackedRows<T> key_rows(p.kv.key, seq), value_rows(p.kv.value, seq);
  load_tile<Traits::kKeys, Traits::kThreads>(key, 0, seen - key0, head_dim,
                                             [&](int j) { return key_rows(key0 + j); });
  if constexpr (kGradKey) {
    load_tile<Traits::kKeys, Traits::kThreads>(value, 0, seen - key0, head_dim,
                                               [&](int j) { return value_rows(key0 + j); });
  }
  // In the loop rows count from token 0.
  const int32_t first_head = seq.kv_head * seq.group, state0 = first_state(p, seq);
  const auto group = static_cast<uint32_t>(seq.group);
  const uint32_t inverse_group = std::numeric_limits<uint32_t>::max() / group;  // times 2^32
  const int32_t row_begin = seq.first_token * seq.group + seq.first_row_beyond(p, key0);
  const int32_t row_end = seq.first_token * seq.group + seq.rows();
  const auto load_rows = [&](int32_t row0, int place) {
    load_tiles<kRows, Traits::kThreads>(
        query, grad_out, place, row_end - row0, head_dim, [&](int r) {
          // row / group and row % group; the first product is at most 1 too low.
          const auto row = static_cast<uint32_t>(row0 + r);
          auto token = static_cast<uint32_t>(uint64_t{row} * inverse_group >> 32);
          uint32_t head = row - token * group;
          if (head >= group) {
            ++token;
            head -= group;
          }
          return std::pair(row_at<T>(p.query, token, first_head + head),
                           row_at<T>(bwd.grad_out, token, first_head + head));
        });
    load_states<kRows, Traits::kThreads>(states + place, all_states + (state0 + row0),
                                         row_end - row0);
  };

  const int warp_key = thread_index() / kWarpSize * Traits::kWarpKeys;
  const int32_t warp_key0 = key0 + warp_key;
  // The keys of the warp end here; a tile of rows is masked if its first row does not see them all.
  const int32_t warp_end =
      warp_key0 + Traits::kWarpKeys < seq.keys ? warp_key0 + Traits::kWarpKeys : seq.keys;
  const Weights<T> to_weights(p.softmax_scale);
  typename Traits::Gradients grad_key = {}, grad_value = {};
  walk<kRows, Traits::kStages>(row_begin, row_end, load_rows, [&](int32_t, int place) {
    typename Traits::Products weights, grad = {};
    multiply_rows(weights, key, warp_key, query, place);
    if constexpr (kGradKey) {
      multiply_rows(grad, value, warp_key, grad_out, place);
    }
    const auto state = [&](int, int j, int e) -> BackwardRow {
      return states[place + accumulator_column(j, e)];
    };
    const auto key_of = [&](int i, int, int e) { return warp_key0 + accumulator_row(i, e); };
    const BackwardRow first = states[place];
    if (first.limit < warp_end) {
      softmax_backward<true>(weights, grad, to_weights, state, key_of);
    } else {
      softmax_backward<false>(weights, grad, to_weights, state, key_of);
    }
    if constexpr (kGradKey) {
      multiply_accumulators(grad_key, grad, query, place);
    }
    if constexpr (kGradValue) {
      multiply_accumulators(grad_value, weights, grad_out, place);
    }
  });

  const auto write = [&](void* tensor, const typename Traits::Gradients& grad, float factor) {
    stage_rows(key, warp_key, grad, [&](int, int) { return factor; });
    store_rows(key, warp_key, Traits::kWarpKeys, head_dim, [&](int r) -> T* {
      const int32_t j = warp_key0 + r;
      const int64_t row = (int64_t{seq.first_key} + j) * p.kv_heads + seq.kv_head;
      return j < warp_end ? static_cast<T*>(tensor) + row * p.head_dim : nullptr;
    });
  };
  if constexpr (kGradKey) {
    write(bwd.grad_key, grad_key, static_cast<float>(p.softmax_scale));
  }
  if constexpr (kGradValue) {
    write(bwd.grad_value, grad_value, 1);
  }
}

template <typename T, int kDim, bool kGradKey, bool kGradValue>
cudaError_t launch_backward_keys(const AttentionBwdParams& bwd, const BackwardRow* states,
                                 cudaStream_t stream) {
  using Traits = BackwardKeysTraits<T, kDim>;
  const int64_t keys = bwd.forward.kv.total_keys, batch = bwd.forward.batch;
  const int64_t tiles = keys / Traits::kKeys + (batch < keys ? batch : keys);
  return launch("attention_bwd_keys", attention_bwd_keys<T, kDim, kGradKey, kGradValue>,
                {{static_cast<uint32_t>(tiles), static_cast<uint32_t>(bwd.forward.kv_heads), 1},
                 Traits::kThreads,
                 Traits::kSharedBytes},
                stream, bwd, states);
}

template <typename T, int kDim>
cudaError_t backward_keys(const AttentionBwdParams& bwd, const BackwardRow* states,
                          cudaStream_t stream) {
  if constexpr (BackwardKeysTraits<T, kDim>::kTogether) {
    return launch_backward_keys<T, kDim, true, true>(bwd, states, stream);
  } else {
    const cudaError_t error = launch_backward_keys<T, kDim, true, false>(bwd, states, stream);
    return error != cudaSuccess ? error
                                : launch_backward_keys<T, kDim, false, true>(bwd, states, stream);
  }
}

}  // namespace mor::cuda
