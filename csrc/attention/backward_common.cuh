// What the kernels of the backward pass share.
#pragma once

#include <cmath>

#include "attention/sequence.cuh"
#include "attention/tile.cuh"

namespace mor::cuda {

// Weights from scores, by the lse that the forward pass gave. In fp32 the exponent is a difference
// before it is scaled to base 2: at scores in the thousands a rounded factor would show.
template <typename T>
class Weights {
  static constexpr bool kFloat = std::is_same_v<T, float>;
  static constexpr float kLog2E = 1.44269504f;

 public:
  __device__ explicit Weights(double softmax_scale)
      : factor_(static_cast<float>(softmax_scale * (kFloat ? 1 : double{kLog2E}))) {}

  // lse in the unit that operator() takes it in; a row that saw nothing gets weights of 0.
  __device__ static float lse(float lse) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    return lse == -kInfinity ? kInfinity : lse * (kFloat ? 1 : kLog2E);
  }

  __device__ float operator()(float score, float lse) const {
    const float exponent = fmaf(score, factor_, -lse);
    return fast_exp2(kFloat ? exponent * kLog2E : exponent);
  }

 private:
  float factor_;
};

// What the kernels need of a row beside its query and grad_out. They lie in memory in the order of
// Sequence's rows, so that a tile of them is a row of 16-byte chunks.
struct alignas(16) BackwardRow {
  float lse;      // by Weights::lse
  float delta;    // sum(grad_out * out) - grad_lse
  int32_t limit;  // how many keys the row sees
  int32_t row;    // token * heads + head
};

// The place of a KV head's state of token 0 and its first head among them. There are fewer than
// 2^31.
__device__ inline int32_t first_state(const AttentionParams& p, const Sequence& seq) {
  return seq.kv_head * static_cast<int32_t>(p.total_q) * seq.group;
}

// The head_dim elements at a row and head of a tensor, from what is in constant memory and two
// registers: in the loops there are none to spare.
template <typename T>
__device__ const T* row_at(const HeadRows& tensor, uint32_t row, uint32_t head) {
  return static_cast<const T*>(tensor.data) + row * tensor.row_stride + head * tensor.head_stride;
}

// Starts copies of kCount states to `to`, by kThreads threads; zeros from `rows` on, which do no
// harm: queries and grad_out are zero there.
template <int kCount, int kThreads>
__device__ void load_states(const Shared<BackwardRow>& to, const BackwardRow* from, int32_t rows) {
  static_assert(sizeof(BackwardRow) == 16 && kCount <= kThreads);
  const int i = thread_index();
  if (i < kCount) {
    copy_async(to + i, i < rows ? from + i : from, i < rows);
  }
}

// As load_tile, of two tensors with the same rows: row(i) is a pair of pointers, never null.
template <int kCount, int kThreads, typename T, int kRows, int kDim, typename Row>
__device__ void load_tiles(const Tile<T, kRows, kDim>& a, const Tile<T, kRows, kDim>& b, int first,
                           int rows, int head_dim, Row&& row) {
  constexpr int kChunks = Tile<T, kRows, kDim>::kChunks, kRowsAtOnce = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kCount % kRowsAtOnce == 0);
  const int chunk = thread_index() % kChunks;
  const bool inside = chunk * kVector16<T> < head_dim;
#pragma unroll 4
  for (int i = 0; i < kCount / kRowsAtOnce; ++i) {
    const int r = thread_index() / kChunks + i * kRowsAtOnce;
    const bool valid = inside && r < rows;
    const auto [from_a, from_b] = row(valid ? r : 0);
    const int column = valid ? chunk * kVector16<T> : 0;
    copy_async(a.chunk(first + r, chunk), from_a + column, valid);
    copy_async(b.chunk(first + r, chunk), from_b + column, valid);
  }
}

// Scores become weights, and gradients of weights those of the scaled scores; both are 0 where a
// row does not see a key, whatever was computed there. state(i, j, e) and key(i, j, e) are the row
// and the key of an element.
template <bool kMasked, typename T, int kRowTiles, int kColumnTiles, typename State, typename Key>
__device__ void softmax_backward(float (&scores)[kRowTiles][kColumnTiles][4],
                                 float (&grad)[kRowTiles][kColumnTiles][4],
                                 const Weights<T>& weights, State&& state, Key&& key) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const BackwardRow row = state(i, j, e);
        const bool seen = !kMasked || key(i, j, e) < row.limit;
        const float weight = weights(scores[i][j][e], row.lse);
        scores[i][j][e] = seen ? weight : 0;
        grad[i][j][e] = seen ? weight * (grad[i][j][e] - row.delta) : 0;
      }
    }
  }
}

// Calls work(item, place) for item = begin, begin + kStep, ... below end, when what
// load(item, place) has started to copy is there for all threads. place is where in tiles of
// kStages * kStep rows; with two stages the next item is copied meanwhile.
template <int kStep, int kStages, typename Load, typename Work>
__device__ __forceinline__ void walk(int32_t begin, int32_t end, Load&& load, Work&& work) {
  static_assert(kStages == 1 || kStages == 2);
  if (begin < end) {
    load(begin, 0);
  }
  copy_async_commit();
  int stage = 0;
  for (int32_t left = end - begin; left > 0; left -= kStep, stage = (stage + 1) % kStages) {
    const int32_t item = end - left;
    const bool last = left <= kStep;
    copy_async_wait<0>();
    sync_threads();  // this item is there, and nobody reads the one that is overwritten next
    if (kStages == 2 && !last) {
      load(item + kStep, (1 - stage) * kStep);
      copy_async_commit();
    }
    work(item, stage * kStep);
    if (kStages == 1 && !last) {
      sync_threads();
      load(item + kStep, 0);
      copy_async_commit();
    }
  }
  copy_async_wait<0>();
  sync_threads();
}

}  // namespace mor::cuda
