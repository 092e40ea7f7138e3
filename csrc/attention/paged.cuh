// Attention over a paged cache. Lanes with many rows (prefill) take the forward kernel of packed
// sequences. Lanes with few (decode) are limited by the reading of their keys: those are split into
// pieces, so that one long lane keeps the whole device busy, and a last kernel combines the results
// of the pieces. Each kernel finds its lanes in device memory.
#pragma once

#include <algorithm>

#include "attention/combine.cuh"
#include "attention/forward.cuh"

namespace mor::cuda {

// 64 KiB of keys and values are on their way at any time, in as many stages as that gives; two or
// three such blocks fit a multiprocessor with 164 KiB or more of shared memory.
template <typename T, int kDim_>
struct DecodeTraits {
  static constexpr int kDim = kDim_;
  static constexpr int kRows = kDecodeTileRows, kKeys = 16;  // of a warp's product
  static constexpr int kStepBytes = 2 * kKeys * kDim * static_cast<int>(sizeof(T));
  static constexpr int kWarps = std::min(4, (32 << 10) / kStepBytes);
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kStages = (64 << 10) / (kWarps * kStepBytes);
  static constexpr int kBlockKeys = kWarps * kKeys;  // that all warps take in one step
  static_assert(kPieceStep % kBlockKeys == 0);

  using Query = Tile<T, kRows, kDim>;
  using Keys = Tile<T, kWarps * kStages * kKeys, kDim>;
  using Sums = Tile<float, kRows, kDim>;  // of a warp, in the place of its keys
  static_assert(Sums::kBytes <= Keys::kBytes / kWarps);
  static constexpr int64_t kStatesBytes = shared_bytes<RowState>(kWarps * kRows);
  static constexpr int64_t kSharedBytes =
      Query::kBytes + 2 * Keys::kBytes + RowTable::bytes(kRows) + kStatesBytes;
  static_assert(kSharedBytes <= 99 << 10);
};

// A block takes one piece of the keys of a tile of rows after the other. Its warps take turns at
// steps of 16 keys; each copies its keys and keeps a running softmax for itself, so that they wait
// for each other only when a piece is done.
template <typename T, int kDim>
class DecodeBlock {
  using Traits = DecodeTraits<T, kDim>;
  static constexpr int kRows = Traits::kRows, kKeys = Traits::kKeys, kWarps = Traits::kWarps;
  static constexpr int kStages = Traits::kStages, kBlockKeys = Traits::kBlockKeys;
  using Out = float[1][kDim / 8][4];

 public:
  __device__ DecodeBlock(SharedArena& arena, const PagedParams& p, const ScoreScale& scale)
      : p_(p),
        scale_(scale),
        query_(Traits::Query::take(arena)),
        key_(Traits::Keys::take(arena)),
        value_(Traits::Keys::take(arena)),
        table_(arena, kRows),
        states_(arena.take<RowState>(kWarps * kRows)),
        warp_(thread_index() / kWarpSize) {}

  // Item `number` of a lane: its KV heads, their pieces, their tiles of rows, in this order, so
  // that the tiles that read the same keys are worked on at the same time.
  __device__ void work(int64_t lane, const LaneSplit& split, int32_t number) const {
    const int32_t tile = number % split.row_tiles, head_and_piece = number / split.row_tiles;
    const int32_t piece = head_and_piece % split.pieces, row0 = tile * kRows;
    const Sequence seq(p_, lane, head_and_piece / split.pieces);
    const int32_t rows = seq.rows() - row0 < kRows ? seq.rows() - row0 : kRows;
    const int32_t seen = seq.limit(p_, row0 + rows - 1);  // keys that any of the rows sees
    const int64_t begin = int64_t{piece} * split.piece_keys, end = begin + split.piece_keys;

    Softmax<1> softmax;
    Out out = {};
    attend(seq, row0, rows, static_cast<int32_t>(begin),
           static_cast<int32_t>(end < seen ? end : seen), softmax, out);
    merge(softmax, out);
    write(seq, row0, rows, split.pieces, piece);
    sync_threads();  // the next item overwrites what is read here
  }

 private:
  // Takes in the warp's share of the keys [begin, end).
  __device__ void attend(const Sequence& seq, int32_t row0, int32_t rows, int32_t begin,
                         int32_t end, Softmax<1>& softmax, Out& out) const {
    const PagedKeys keys(p_, seq, end);
    const int32_t first_key = begin + warp_ * kKeys;
    const int first_row = warp_ * kStages * kKeys;
    PagedKeys::Place place[kStages];
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      place[stage] = keys.find(first_key + stage * kBlockKeys);
    }
    constexpr int kShare = kWarps == 1 ? kRows : kRows / 2;
    if (warp_ * kShare < kRows) {
      load_rows<kShare>(query_, warp_ * kShare, p_.head_dim, p_.query.data, [&](int i) {
        const int r = warp_ * kShare + i;
        return RowOffset{seq.offset_of(p_.query, row0 + r), r < rows};
      });
    }
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      load(keys, first_row + stage * kKeys, first_key + stage * kBlockKeys, end, place[stage]);
    }
    auto next = keys.find(first_key + kStages * kBlockKeys);
    if (thread_index() < kRows) {
      table_.fill(p_, seq, row0, thread_index());
    }
    copy_async_wait<kStages - 1>();
    sync_threads();  // queries and table are there

    int stage_row = 0;
    for (int32_t key0 = first_key; key0 < end; key0 += kBlockKeys) {
      const int row = first_row + stage_row;
      copy_async_wait<kStages - 1>();
      sync_warp();
      float scores[1][kKeys / 8][4];
      multiply_rows(scores, query_, 0, key_, row);
      scale_.prepare(scores);
      if (key0 + kKeys > table_[0].limit) {
        mask_scores(scores, key0,
                    [&](int i, int half) { return table_[accumulator_row(i, 2 * half)].limit; });
      }
      softmax.template update<sizeof(T) == 4>(scores, out, scale_.factor);
      multiply_accumulators(out, scores, value_, row);
      sync_warp();  // no lane reads this stage any more
      load(keys, row, key0 + kStages * kBlockKeys, end, next);
      next = keys.find(key0 + (kStages + 1) * kBlockKeys);
      stage_row = (stage_row + kKeys) % (kStages * kKeys);
    }
    softmax.finish();
  }

  // A group of copies, empty past the end.
  __device__ void load(const PagedKeys& keys, int row, int32_t key0, int32_t end,
                       PagedKeys::Place place) const {
    if (key0 < end) {
      keys.load<kKeys>(key_, value_, row, key0, place);
    }
    copy_async_commit();
  }

  // Leaves the warp's sums in shared memory, relative to the maximum of all warps.
  __device__ void merge(const Softmax<1>& softmax, const Out& out) const {
    for_each_row<1>([&](int i, int half) {
      if (lane_index() % 4 == 0) {
        states_[warp_ * kRows + accumulator_row(i, 2 * half)] = softmax.state(i, half);
      }
    });
    sync_threads();
    stage_rows(sums(warp_), 0, out, [&](int i, int half) {
      return softmax.state(i, half).rescale(whole(accumulator_row(i, 2 * half)).maximum,
                                            scale_.factor);
    });
    sync_threads();
  }

  // The results of the piece, or, if there are no others, of the rows.
  __device__ void write(const Sequence& seq, int32_t row0, int32_t rows, int32_t pieces,
                        int32_t piece) const {
    constexpr int kChunks = Traits::Query::kChunks, kColumns = kVector16<T>, kParts = kColumns / 4;
    for (int i = thread_index(); i < rows * kChunks; i += Traits::kThreads) {
      const int r = i / kChunks, column = i % kChunks * kColumns;
      if (column >= p_.head_dim) {
        continue;
      }
      Vector<float, 4> sum[kParts];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        sum[part] = sum_of_warps(r, column + 4 * part);
      }
      const RowState state = whole(r);
      if (pieces > 1) {
        const int64_t index = p_.results.index(seq, row0 + r, pieces, piece);
        auto* to =
            reinterpret_cast<Vector<float, 4>*>(p_.results.out + index * p_.head_dim + column);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          to[part] = sum[part];
        }
        if (column == 0) {
          p_.results.states[index] = state;
        }
      } else {
        const RowInfo row = table_[r];
        Vector<T, kColumns> result;
#pragma unroll
        for (int e = 0; e < kColumns; ++e) {
          result[e] = from_float<T>(sum[e / 4][e % 4] * state.inverse_sum());
        }
        T* to = static_cast<T*>(p_.out) + (row.token * p_.heads + row.head) * p_.head_dim + column;
        *reinterpret_cast<Vector<T, kColumns>*>(to) = result;
        if (column == 0) {
          static_cast<float*>(p_.lse)[row.head * p_.total_q + row.token] = state.lse(scale_.factor);
        }
      }
    }
  }

  // Columns [column, column + 4) of a row.
  __device__ Vector<float, 4> sum_of_warps(int row, int column) const {
    Vector<float, 4> sum{};
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      const Shared<float> chunk = sums(warp).chunk(row, column / 4);
      const Vector<float, 4> of_warp = chunk.as<Vector<float, 4>>()[0];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        sum[e] += of_warp[e];
      }
    }
    return sum;
  }

  // What all warps together know of a row.
  __device__ RowState whole(int row) const {
    RowState state{-kInfinity, 0};
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      const RowState of_warp = states_[warp * kRows + row];
      state.maximum = fmaxf(state.maximum, of_warp.maximum);
    }
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      const RowState of_warp = states_[warp * kRows + row];
      state.sum += of_warp.sum * of_warp.rescale(state.maximum, scale_.factor);
    }
    return state;
  }

  __device__ typename Traits::Sums sums(int warp) const {
    return {(key_.data + warp * kStages * kKeys * kDim).template as<float>()};
  }

  const PagedParams& p_;
  const ScoreScale& scale_;
  typename Traits::Query query_;
  typename Traits::Keys key_, value_;
  RowTable table_;
  Shared<RowState> states_;  // [kWarps, kRows]
  int warp_;
};

// Grid: as many blocks as the device holds at once; each strides over the items of all lanes.
template <typename T, int kDim>
__global__ void __launch_bounds__(DecodeTraits<T, kDim>::kThreads, 3)
    paged_decode(const __grid_constant__ PagedParams p, const __grid_constant__ ScoreScale scale) {
  SharedArena arena;
  const DecodeBlock<T, kDim> block(arena, p, scale);
  int64_t lane = 0, first_item = 0;  // first_item: the number of the lane's first
  for (int64_t item = block_index().x;; item += grid_size().x) {
    int64_t number = item - first_item;
    const auto items_of = [&](int64_t b) {
      const LaneSplit split(p, b);
      return p.kv_heads * split.row_tiles * split.pieces;
    };
    lane = find_sequence(p.batch, number, items_of, lane);
    if (lane < 0) {
      return;
    }
    first_item = item - number;
    block.work(lane, LaneSplit(p, lane), static_cast<int32_t>(number));
  }
}

template <typename T, int kDim>
cudaError_t launch_decode(const PagedParams& p, cudaStream_t stream) {
  using Traits = DecodeTraits<T, kDim>;
  int device = 0, processors = 0, shared_bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    constexpr auto kAttribute = cudaDevAttrMaxSharedMemoryPerMultiprocessor;
    error = cudaDeviceGetAttribute(&shared_bytes, kAttribute, device);
  }
  if (error != cudaSuccess) {
    return error;
  }
  constexpr int64_t kReserved = 1 << 10;  // of shared memory, in each block
  const int64_t resident = std::max<int64_t>(1, shared_bytes / (Traits::kSharedBytes + kReserved));
  const int64_t rows = p.total_q * (p.heads / p.kv_heads);
  const int64_t items =
      (rows / Traits::kRows + std::min(p.batch, rows)) * p.kv_heads * pieces_bound(p);
  const auto blocks = static_cast<uint32_t>(std::min(items, processors * resident));
  return launch("paged_decode", paged_decode<T, kDim>,
                {{blocks, 1, 1}, Traits::kThreads, Traits::kSharedBytes}, stream, p,
                ScoreScale(p.softmax_scale));
}

template <typename T>
cudaError_t paged_attention_of(const PagedParams& p, cudaStream_t stream) {
  const int64_t group = p.heads / p.kv_heads;
  return dispatch_head_dim(p.head_dim, [&]<int kDim>() {
    cudaError_t error = cudaSuccess;
    if (std::min(p.max_seqlen_q, p.total_q) * group > decode_rows(group)) {
      error = launch_forward<T, kDim, PagedKeys>(p, stream);
    }
    if (error == cudaSuccess) {
      error = launch_decode<T, kDim>(p, stream);
    }
    const bool split = p.results.head_stride > 0;
    return error == cudaSuccess && split ? launch_combine<T>(p, stream) : error;
  });
}

}  // namespace mor::cuda
