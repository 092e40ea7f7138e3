// Flash attention backward over packed sequences (FlashAttention-2, arXiv 2307.08691, algorithm 2),
// without atomics: the same bits every time.
//
// Algorithm 2 walks the keys and adds what every tile of them contributes to grad_query in memory,
// in no fixed order. Here one kernel owns keys and another one owns queries, and each sum stays in
// the registers of one warp. Both compute the scores and the gradients of the weights: 7 products
// of tiles in place of 5.
#pragma once

#include "attention/backward_keys.cuh"
#include "attention/backward_queries.cuh"

namespace mor::cuda {

struct BackwardRowsTraits {
  static constexpr int kThreads = 256;
  static constexpr int kRowLanes = 8;  // of a row; a divisor of the warp's
  static constexpr int kRows = 64;
};

// The state of every row. Grid: (tiles of rows of all sequences, KV heads).
template <typename T>
__global__ void __launch_bounds__(BackwardRowsTraits::kThreads)
    attention_bwd_rows(const __grid_constant__ AttentionBwdParams bwd, BackwardRow* all_states) {
  using Traits = BackwardRowsTraits;
  using Chunk = Vector<T, kVector16<T>>;
  constexpr int kRowsAtOnce = Traits::kThreads / Traits::kRowLanes;
  const AttentionParams& p = bwd.forward;
  const auto group = static_cast<int32_t>(p.heads / p.kv_heads);
  int64_t tile = block_index().x;
  const int64_t b = find_sequence(p.batch, tile, [&](int64_t s) {
    return ceil_div(int64_t{length_at(p.cu_seqlens_q, s, p.total_q)} * group, Traits::kRows);
  });
  if (b < 0) {
    return;
  }
  const Sequence seq(p, b, static_cast<int32_t>(block_index().y));
  const HeadRows out_rows{p.out, p.heads * p.head_dim, p.head_dim};
  const auto* grad_lse = static_cast<const float*>(bwd.grad_lse);
  const int lane = thread_index() % Traits::kRowLanes;
#pragma unroll 1
  for (int i = 0; i < Traits::kRows; i += kRowsAtOnce) {
    const auto row =
        static_cast<int32_t>(tile * Traits::kRows + i + thread_index() / Traits::kRowLanes);
    const bool inside = row < seq.rows();
    float sum = 0;
    if (inside) {
      const T *out = seq.row_of<T>(out_rows, row), *grad_out = seq.row_of<T>(bwd.grad_out, row);
      for (int64_t d = lane * kVector16<T>; d < p.head_dim; d += Traits::kRowLanes * kVector16<T>) {
        const auto a = *reinterpret_cast<const Chunk*>(out + d);
        const auto c = *reinterpret_cast<const Chunk*>(grad_out + d);
#pragma unroll
        for (int e = 0; e < kVector16<T>; ++e) {
          sum = fmaf(to_float(a[e]), to_float(c[e]), sum);
        }
      }
    }
#pragma unroll
    for (int bits = 1; bits < Traits::kRowLanes; bits *= 2) {
      sum += shuffle_xor(sum, bits);
    }
    if (inside && lane == 0) {
      const int64_t at = seq.head(row) * p.total_q + seq.token(row);
      all_states[first_state(p, seq) + seq.first_token * seq.group + row] = {
          .lse = Weights<T>::lse(static_cast<const float*>(p.lse)[at]),
          .delta = sum - (grad_lse != nullptr ? grad_lse[at] : 0),
          .limit = seq.limit(p, row),
          .row = static_cast<int32_t>(seq.token(row) * p.heads + seq.head(row))};
    }
  }
}

template <typename T>
cudaError_t backward_rows(const AttentionBwdParams& bwd, BackwardRow* states, cudaStream_t stream) {
  using Traits = BackwardRowsTraits;
  const AttentionParams& p = bwd.forward;
  const int64_t rows = p.total_q * (p.heads / p.kv_heads);
  const int64_t tiles = rows / Traits::kRows + (p.batch < rows ? p.batch : rows);
  return launch(
      "attention_bwd_rows", attention_bwd_rows<T>,
      {{static_cast<uint32_t>(tiles), static_cast<uint32_t>(p.kv_heads), 1}, Traits::kThreads},
      stream, bwd, states);
}

template <typename T, int kDim>
cudaError_t backward(const AttentionBwdParams& bwd, BackwardRow* states, cudaStream_t stream) {
  cudaError_t error = backward_rows<T>(bwd, states, stream);
  if (error == cudaSuccess) {
    error = backward_keys<T, kDim>(bwd, states, stream);
  }
  return error == cudaSuccess ? backward_queries<T, kDim>(bwd, states, stream) : error;
}

template <typename T>
cudaError_t attention_bwd_of(const AttentionBwdParams& bwd, void* row_states, cudaStream_t stream) {
  auto* states = static_cast<BackwardRow*>(row_states);
  return dispatch_head_dim(bwd.forward.head_dim,
                           [&]<int kDim>() { return backward<T, kDim>(bwd, states, stream); });
}

}  // namespace mor::cuda
