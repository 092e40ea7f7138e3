// Flash attention forward on the CPU (FlashAttention-2, arXiv 2307.08691, algorithm 1).
//
// A task is a chunk of rows of one (sequence, KV head). It walks the keys block by block, packs
// each block once and reuses it for all of its row tiles; tiles that see nothing of a block are
// skipped, and only tiles that a limit crosses are masked. What a row computes does not depend
// on the tile, chunk or thread it is in.
#pragma once

#include <cmath>
#include <numbers>
#include <vector>

#include "attention/cpu_gemm.h"
#include "attention/cpu_sequence.h"
#include "common/parallel.h"
#include "common/scratch.h"

namespace mor::MOR_ISA {

inline constexpr int64_t kChunkBytes = 256 << 10;  // of a task's output accumulators

// Where a (sequence, KV head) has few rows, as in decode, its keys are split into pieces of this
// many, so that one long sequence keeps every thread busy. The split knows nothing of the
// threads, so neither does the result.
inline constexpr int64_t kSplitRows = 32;
inline constexpr int64_t kSplitKeys = 2048;

// A factor for scores s so that exp2(factor * s) = exp(scale * s), split into a non-negative
// part (so that the maximum commutes with it) and a sign that goes onto the packed queries.
template <typename Acc>
struct ScoreScale {
  explicit ScoreScale(double scale)
      : sign(scale > 0   ? Acc{1}
             : scale < 0 ? Acc{-1}
                         : Acc{0}),
        factor(scale == 0 ? Acc{1} : static_cast<Acc>(std::abs(scale) * std::numbers::log2e)) {}
  Acc sign, factor;
};

// Sets the scores of keys that their row does not see to fill.
template <typename T, typename Acc>
void mask_scores(const Sequence<T>& seq, int64_t row0, int64_t rows, int64_t key0, int64_t keys,
                 Acc fill, Acc* scores, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t visible = std::clamp<int64_t>(seq.limit(row0 + r) - key0, 0, keys);
    std::fill(scores + r * stride + visible, scores + r * stride + keys, fill);
  }
}

template <typename Gemm>
class ForwardTask {
  using T = typename Gemm::Storage;
  using Acc = typename Gemm::Acc;
  using In = typename Gemm::In;
  using Vec = vec_t<Acc>;
  static constexpr int64_t kWidth = kLanes<Acc>;
  static constexpr int64_t kKeyBlock = Gemm::kKeyBlock;
  static_assert(kKeyBlock % Gemm::kPanel == 0);
  // Rows of a tile a cache line more than a power of two apart: no two share their cache sets.
  static constexpr int64_t kScoreStride = kKeyBlock + 64 / sizeof(Acc);
  static constexpr int64_t kWeightStride = kKeyBlock + 64 / sizeof(In);
  static constexpr Acc kNothing = -std::numeric_limits<Acc>::infinity();

 public:
  ForwardTask(const AttentionParams& p, const Sequence<T>& seq, int64_t row0, int64_t rows)
      : p_(p),
        seq_(seq),
        row0_(row0),
        rows_(rows),
        padded_(padded(p.head_dim)),
        scale_(p.softmax_scale) {
    // Tiles may run past the chunk's rows, so everything indexed by row is padded to whole tiles.
    const int64_t padded_rows = round_up(rows, Gemm::kTileRows);
    thread_local Scratch scratch;
    scratch.reset(Scratch::bytes_for<In>(padded_rows * padded_) +
                  Scratch::bytes_for<In>(kKeyBlock * padded_) +
                  Scratch::bytes_for<In>(kKeyBlock * round_up(padded_, Gemm::kPanel)) +
                  Scratch::bytes_for<Acc>(Gemm::kTileRows * kScoreStride) +
                  Scratch::bytes_for<In>(Gemm::kTileRows * kWeightStride) +
                  Scratch::bytes_for<Acc>(padded_rows * padded_) +
                  Scratch::bytes_for<Acc>(padded_rows + kWidth) * 2);
    query_ = scratch.take<In>(padded_rows * padded_);
    key_ = scratch.take<In>(kKeyBlock * padded_);
    value_ = scratch.take<In>(kKeyBlock * round_up(padded_, Gemm::kPanel));
    scores_ = scratch.take<Acc>(Gemm::kTileRows * kScoreStride);
    weights_ = scratch.take<In>(Gemm::kTileRows * kWeightStride);
    sum_ = scratch.take<Acc>(padded_rows * padded_);
    max_ = scratch.take<Acc>(padded_rows + kWidth);
    denominator_ = scratch.take<Acc>(padded_rows + kWidth);

    for (int64_t r = 0; r < padded_rows; ++r) {
      if (r + kPrefetchRows < rows) {
        prefetch_row(seq.query(row0 + r + kPrefetchRows), p.head_dim);
      }
      if (r < rows) {
        Gemm::pack_row(seq.query(row0 + r), p.head_dim, padded_, scale_.sign, query_ + r * padded_);
      } else {
        std::fill_n(query_ + r * padded_, padded_, In{});
      }
    }
    std::fill_n(sum_, padded_rows * padded_, Acc{0});
    std::fill_n(max_, padded_rows + kWidth, kNothing);
    std::fill_n(denominator_, padded_rows + kWidth, Acc{0});
  }

  // Takes in the keys [begin, end), begin a multiple of kKeyBlock.
  void attend(int64_t begin, int64_t end) {
    end = std::min(end, rows_ > 0 ? seq_.limit(row0_ + rows_ - 1) : 0);
    for (int64_t key0 = begin; key0 < end; key0 += kKeyBlock) {
      const int64_t keys = std::min(kKeyBlock, end - key0);
      const auto key = Gemm::pack_columns([&](int64_t j) { return seq_.key(key0 + j); }, keys,
                                          p_.head_dim, padded_, key_);
      const auto value = Gemm::pack_depth([&](int64_t j) { return seq_.value(key0 + j); }, keys,
                                          p_.head_dim, padded_, value_);
      for (int64_t r = 0; r < rows_; r += Gemm::kTileRows) {
        const int64_t tile_rows = std::min<int64_t>(Gemm::kTileRows, rows_ - r);
        const int64_t limit = seq_.limit(row0_ + r + tile_rows - 1);
        if (limit > key0) {
          prefetch_share(key0 + kKeyBlock, r / Gemm::kTileRows, end);
          attend_tile(r, tile_rows, key0, std::min(keys, limit - key0), key, value);
        }
      }
    }
  }

  // What the task knows of its rows, for another task of the same rows to absorb.
  static int64_t state_size(int64_t rows, int64_t head_dim) {
    return rows * (padded(head_dim) + 2);
  }

  void save(Acc* state) const {
    state = std::copy_n(max_, rows_, state);
    state = std::copy_n(denominator_, rows_, state);
    std::copy_n(sum_, rows_ * padded_, state);
  }

  void absorb(const Acc* state) {
    for (int64_t r = 0; r < rows_; ++r) {
      const Acc other_max = state[r], other_denominator = state[rows_ + r];
      if (other_denominator == 0) {
        continue;
      }
      const Acc top = std::max(max_[r], other_max);
      const Acc keep = std::exp2(max_[r] - top);
      const Acc take = std::exp2(other_max - top);
      max_[r] = top;
      denominator_[r] = denominator_[r] * keep + other_denominator * take;
      Acc* sum = sum_ + r * padded_;
      const Acc* other = state + 2 * rows_ + r * padded_;
      for (int64_t d = 0; d < padded_; d += kWidth) {
        store<Acc>(sum + d, load<Acc>(sum + d) * keep + load<Acc>(other + d) * take);
      }
    }
  }

  // out = sum / denominator, lse = ln(denominator) + maximum.
  void write() const {
    for (int64_t r = 0; r < rows_; ++r) {
      const Acc inverse = denominator_[r] == 0 ? Acc{0} : 1 / denominator_[r];
      const Acc* sum = sum_ + r * padded_;
      T* out = static_cast<T*>(p_.out) + seq_.token_major(row0_ + r) * p_.head_dim;
      for_each_vector<Acc>(p_.head_dim, [&](int64_t d, auto lanes) {
        store_lanes(out + d, load<Acc>(sum + d) * inverse, lanes);
      });
      // In double: an error here would scale every weight that the backward pass recomputes.
      static_cast<Acc*>(p_.lse)[seq_.head_major(row0_ + r)] =
          denominator_[r] == 0 ? kNothing
                               : static_cast<Acc>((double{max_[r]} + std::log2(denominator_[r])) *
                                                  std::numbers::ln2);
    }
  }

 private:
  static int64_t padded(int64_t head_dim) {
    return round_up(head_dim, std::max(Gemm::kDepthMultiple, Gemm::kColumnMultiple));
  }

  // Asks for one tile's share of the keys and values from next on, the block that comes after.
  void prefetch_share(int64_t next, int64_t tile, int64_t end) const {
    const int64_t share = ceil_div(kKeyBlock * Gemm::kTileRows, rows_);
    const int64_t begin = next + tile * share;
    for (int64_t j = begin; j < std::min({begin + share, next + kKeyBlock, end}); ++j) {
      prefetch_row(seq_.key(j), p_.head_dim);
      prefetch_row(seq_.value(j), p_.head_dim);
    }
  }

  void attend_tile(int64_t r, int64_t tile_rows, int64_t key0, int64_t keys, Panels<In> key,
                   Panels<In> value) {
    // Columns past the keys count as unseen ones: their scores are masked, their weights are 0.
    const int64_t columns = round_up(keys, std::max(Gemm::kColumnMultiple, Gemm::kDepthMultiple));
    Gemm::template multiply<false>(tile_rows, columns, padded_, {query_ + r * padded_, padded_},
                                   key, scores_, kScoreStride);
    if (columns > keys || seq_.limit(row0_ + r) < key0 + keys) {
      mask_scores(seq_, row0_ + r, tile_rows, key0, columns, kNothing, scores_, kScoreStride);
    }
    for (int64_t i = 0; i < tile_rows; i += kWidth) {
      softmax_rows(r + i, std::min(kWidth, tile_rows - i), columns, scores_ + i * kScoreStride,
                   weights_ + i * kWeightStride);
    }
    const int64_t depth = round_up(keys, Gemm::kDepthMultiple);
    Gemm::template multiply<true>(tile_rows, padded_, depth, {weights_, kWeightStride}, value,
                                  sum_ + r * padded_, padded_);
  }

  // Turns the scores of up to kWidth rows into weights relative to their maxima so far, and
  // rescales what a row has summed up when its maximum moves. A lane of max_, denominator_ and of
  // what is computed from them is a row; lanes past the rows come out as they went in.
  void softmax_rows(int64_t row0, int64_t rows, int64_t columns, const Acc* scores, In* weights) {
    Vec of_row[kWidth];
    for (int64_t r = 0; r < kWidth; ++r) {
      of_row[r] = splat(kNothing);
      for (int64_t j = 0; r < rows && j < columns; j += kWidth) {
        of_row[r] = max<Acc>(load<Acc>(scores + r * kScoreStride + j), of_row[r]);
      }
    }
    const Vec old_max = load<Acc>(max_ + row0);
    const Vec new_max = max<Acc>(old_max, reduce_each<Acc>(of_row, max<Acc>) * scale_.factor);
    const Vec shift = new_max == kNothing ? Vec{} : new_max;
    for (int64_t r = 0; r < kWidth; ++r) {
      of_row[r] = Vec{};
      for (int64_t j = 0; r < rows && j < columns; j += kWidth) {
        const Vec exponent = load<Acc>(scores + r * kScoreStride + j) * scale_.factor - shift[r];
        const Vec weight = exp2_nonpositive<Acc, Gemm::kExp2Degree>(exponent);
        of_row[r] += weight;
        store<In>(weights + r * kWeightStride + j, weight);
      }
    }
    const Vec keep = exp2_nonpositive<Acc>(old_max - shift);
    const auto add = [](Vec a, Vec b) { return a + b; };
    store<Acc>(max_ + row0, new_max);
    store<Acc>(denominator_ + row0,
               load<Acc>(denominator_ + row0) * keep + reduce_each<Acc>(of_row, add));
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t d = 0; keep[r] != 1 && d < padded_; d += kWidth) {
        Acc* sum = sum_ + (row0 + r) * padded_ + d;
        store<Acc>(sum, load<Acc>(sum) * keep[r]);
      }
    }
  }

  [[no_unique_address]] typename Gemm::Session session_;
  const AttentionParams& p_;
  const Sequence<T>& seq_;
  const int64_t row0_, rows_, padded_;
  const ScoreScale<Acc> scale_;
  In *query_, *key_, *value_, *weights_;
  Acc *scores_, *sum_, *denominator_;
  Acc* max_;  // of scores times scale_.factor, rounded: what the weights are relative to
};

template <typename Gemm>
void attention_forward(const AttentionParams& p) {
  using T = typename Gemm::Storage;
  using Acc = typename Gemm::Acc;
  struct Chunk {
    Sequence<T> seq;
    int64_t row0, rows, pieces;
    std::vector<Acc> states;  // of the pieces, if there are several
  };
  struct Task {
    size_t chunk;
    int64_t piece;
  };
  // Small enough that a chunk's accumulators stay in cache and every thread gets several.
  const int64_t in_cache = kChunkBytes / static_cast<int64_t>(sizeof(Acc)) / p.head_dim;
  const int64_t fair = ceil_div(p.total_q * p.heads, 4 * num_threads());
  const int64_t chunk_rows = round_up(std::min(in_cache, fair), Gemm::kTileRows);
  std::vector<Chunk> chunks;
  std::vector<Task> tasks;
  for (int64_t i = 0; i < p.batch * p.kv_heads; ++i) {
    const Sequence<T> seq(p, i / p.kv_heads, i % p.kv_heads);
    for (int64_t row0 = 0; row0 < seq.rows(); row0 += chunk_rows) {
      const int64_t rows = std::min(chunk_rows, seq.rows() - row0);
      const bool split = seq.rows() <= kSplitRows && seq.limit(seq.rows() - 1) > kSplitKeys;
      const int64_t pieces = split ? ceil_div(seq.limit(seq.rows() - 1), kSplitKeys) : 1;
      for (int64_t piece = 0; piece < pieces; ++piece) {
        tasks.push_back({chunks.size(), piece});
      }
      chunks.push_back({seq, row0, rows, pieces, {}});
    }
  }
  const auto state_size = [&](const Chunk& chunk) {
    return ForwardTask<Gemm>::state_size(chunk.rows, p.head_dim);
  };
  for (Chunk& chunk : chunks) {
    chunk.states.resize(chunk.pieces > 1 ? chunk.pieces * state_size(chunk) : 0);
  }
  parallel_tasks(static_cast<int64_t>(tasks.size()), [&](int64_t i, int64_t) {
    const Task& task = tasks[static_cast<size_t>(i)];
    Chunk& chunk = chunks[task.chunk];
    ForwardTask<Gemm> forward(p, chunk.seq, chunk.row0, chunk.rows);
    if (chunk.pieces == 1) {
      forward.attend(0, chunk.seq.keys());
      forward.write();
    } else {
      forward.attend(task.piece * kSplitKeys, (task.piece + 1) * kSplitKeys);
      forward.save(chunk.states.data() + task.piece * state_size(chunk));
    }
  });
  parallel_tasks(static_cast<int64_t>(chunks.size()), [&](int64_t i, int64_t) {
    const Chunk& chunk = chunks[static_cast<size_t>(i)];
    if (chunk.pieces > 1) {
      ForwardTask<Gemm> merged(p, chunk.seq, chunk.row0, chunk.rows);
      for (int64_t piece = 0; piece < chunk.pieces; ++piece) {
        merged.absorb(chunk.states.data() + piece * state_size(chunk));
      }
      merged.write();
    }
  });
}

}  // namespace mor::MOR_ISA
