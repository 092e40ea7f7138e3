// Combines the results of the pieces that paged_attention splits a lane's keys into.
#pragma once

#include "attention/softmax.cuh"
#include "attention/split.cuh"

namespace mor::cuda {

inline constexpr int kCombineThreads = 128;

// Grid: (lanes, KV heads). A warp takes a row: first what is known of its weights, a piece a lane,
// then the values, four columns a lane; of short rows each half of the warp takes every second
// piece.
template <typename T>
__global__ void __launch_bounds__(kCombineThreads)
    combine_pieces(const __grid_constant__ PagedParams p,
                   const __grid_constant__ ScoreScale scale) {
  const int64_t lane = block_index().x;
  const LaneSplit split(p, lane);
  if (split.pieces <= 1) {
    return;
  }
  const Sequence seq(p, lane, static_cast<int32_t>(block_index().y));
  const int lanes = p.head_dim <= 2 * kWarpSize ? kWarpSize / 2 : kWarpSize;  // that share a piece
  for (int row = thread_index() / kWarpSize; row < seq.rows(); row += kCombineThreads / kWarpSize) {
    const int64_t first = p.results.index(seq, row, split.pieces, 0);
    const RowState* states = p.results.states + first;
    RowState whole{-kInfinity, 0};
    for (int i = lane_index(); i < split.pieces; i += kWarpSize) {
      whole.maximum = fmaxf(whole.maximum, states[i].maximum);
    }
    whole.maximum = warp_reduce(whole.maximum, [](float a, float b) { return fmaxf(a, b); });
    for (int i = lane_index(); i < split.pieces; i += kWarpSize) {
      whole.sum += states[i].sum * states[i].rescale(whole.maximum, scale.factor);
    }
    whole.sum = warp_sum(whole.sum);

    const int64_t token = seq.token(row), head = seq.head(row);
    if (lane_index() == 0) {
      static_cast<float*>(p.lse)[head * p.total_q + token] = whole.lse(scale.factor);
    }
    for (int64_t column0 = 0; column0 < p.head_dim; column0 += 4 * lanes) {
      const int64_t column = column0 + lane_index() % lanes * 4;
      const bool inside = column < p.head_dim;
      Vector<float, 4> sum{};
#pragma unroll 8
      for (int i = lane_index() / lanes; i < split.pieces && inside; i += kWarpSize / lanes) {
        const float* values = p.results.out + (first + i) * p.head_dim + column;
        const auto value = *reinterpret_cast<const Vector<float, 4>*>(values);
        const float factor = states[i].rescale(whole.maximum, scale.factor);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          sum[e] += factor * value[e];
        }
      }
      Vector<T, 4> result;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float other = shuffle_xor(sum[e], kWarpSize / 2);
        sum[e] += lanes < kWarpSize ? other : 0.0f;
        result[e] = from_float<T>(sum[e] * whole.inverse_sum());
      }
      if (inside && lane_index() < lanes) {
        T* out = static_cast<T*>(p.out) + (token * p.heads + head) * p.head_dim + column;
        *reinterpret_cast<Vector<T, 4>*>(out) = result;
      }
    }
  }
}

template <typename T>
cudaError_t launch_combine(const PagedParams& p, cudaStream_t stream) {
  const Index3 grid{static_cast<uint32_t>(p.batch), static_cast<uint32_t>(p.kv_heads), 1};
  return launch("combine_pieces", combine_pieces<T>, {grid, kCombineThreads}, stream, p,
                ScoreScale(p.softmax_scale));
}

}  // namespace mor::cuda
