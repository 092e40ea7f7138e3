// What the kernels on rows share: pieces of rows, which of them a thread takes, factors, sums.
#pragma once

#include <algorithm>
#include <cmath>
#include <initializer_list>

#include "common/launch.cuh"
#include "compact/launch.h"

namespace mor::cuda {

inline constexpr int kThreads = 256;  // of a block
inline constexpr int kInFlight = 4;   // loads that a thread starts before it waits for the first

// ---- pieces: 16 bytes where every row's size and place allow it, else one element ----

// kElements neighbours in a row, as they lie in memory: unpacked where they are used, not before.
template <typename T, int kElements>
struct Piece {
  static constexpr int kBytes = kElements * static_cast<int>(sizeof(T));
  using Word = std::conditional_t<kBytes == 2, uint16_t, uint32_t>;
  Vector<Word, kBytes / static_cast<int>(sizeof(Word))> words;

  __device__ static Piece load(const T* from) { return *reinterpret_cast<const Piece*>(from); }
  __device__ void store(T* to) const { *reinterpret_cast<Piece*>(to) = *this; }

  __device__ float operator[](int i) const {
    if constexpr (sizeof(T) == 4) {
      return std::bit_cast<float>(words[i]);
    } else {
      const uint32_t word = words[i / 2];
      return to_float(T{static_cast<uint16_t>(i % 2 == 0 ? word : word >> 16)});
    }
  }

  // Rounds to nearest even.
  __device__ static Piece of(const float (&values)[kElements]) {
    Piece piece;
    if constexpr (kElements == 1) {
      piece.words[0] = std::bit_cast<Word>(from_float<T>(values[0]));
    } else {
#pragma unroll
      for (int i = 0; i < kBytes / 4; ++i) {
        if constexpr (sizeof(T) == 4) {
          piece.words[i] = std::bit_cast<uint32_t>(values[i]);
        } else {
          piece.words[i] = pack<T>(values[2 * i], values[2 * i + 1]);
        }
      }
    }
    return piece;
  }
};

inline bool multiples_of(int64_t bytes, std::initializer_list<const void*> pointers,
                         std::initializer_list<int64_t> distances) {
  int64_t bits = 0;
  for (const void* pointer : pointers) {
    bits |= static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer));
  }
  for (const int64_t distance : distances) {
    bits |= distance;
  }
  return bits % bytes == 0;
}

// Calls f.template operator()<T, kElements>() with the number of elements of a piece. sizes: in
// elements, of rows and of distances between them.
template <typename F>
cudaError_t dispatch_pieces(DType dtype, std::initializer_list<const void*> pointers,
                            std::initializer_list<int64_t> sizes, F&& f) {
  return dispatch_data_dtype(dtype, [&]<typename T>() {
    const bool wide = multiples_of(16, pointers, {}) && multiples_of(kVector16<T>, {}, sizes);
    return wide ? f.template operator()<T, kVector16<T>>() : f.template operator()<T, 1>();
  });
}

// Whether an element of an index, which nobody has checked, names a row.
MOR_PRIMITIVE bool names_row(int32_t element, int64_t num_rows) {
  return element >= 0 && element < num_rows;
}

// Whether next of a filled inverse holds anything: not where every entry names a row of its own.
MOR_PRIMITIVE bool has_repeats(const InverseIndex& inverse) {
  return inverse.first[inverse.num_rows] != -1;
}

// ---- tiles: for kernels that treat every piece alike ----

inline constexpr int kTilePieces = kThreads * kInFlight;

// What a block takes of [rows, pieces]: as many whole rows as fit in kTilePieces, or a part of one
// row. A thread has kInFlight places in it; the k-th places of neighbouring threads are neighbours.
class Tile {
 public:
  __device__ Tile(int64_t rows, int64_t pieces) {
    const int64_t block = block_index().x;
    uint32_t width = kTilePieces;  // places in a row
    if (pieces <= kTilePieces) {
      width = static_cast<uint32_t>(pieces);
      const int64_t rows_of_tile = kTilePieces / width;
      first_row_ = block * rows_of_tile;
      count_ = static_cast<uint32_t>(std::min(rows - first_row_, rows_of_tile)) * width;
    } else {
      const auto parts = static_cast<uint32_t>(ceil_div(pieces, kTilePieces));
      first_row_ = block_index().x / parts;
      first_piece_ = int64_t{block_index().x % parts} * kTilePieces;
      count_ = static_cast<uint32_t>(std::min<int64_t>(pieces - first_piece_, kTilePieces));
    }
    first_number_ = first_row_ * pieces + first_piece_;
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const uint32_t at = std::min(number_in_tile(k), count_ - 1);
      row_[k] = at / width;
      piece_[k] = at - row_[k] * width;
    }
  }

  // Whether the thread has a k-th place; where not, row and piece are those of the tile's last.
  __device__ bool has(int k) const { return number_in_tile(k) < count_; }
  __device__ int64_t row(int k) const { return first_row_ + row_[k]; }
  __device__ int64_t piece(int k) const { return first_piece_ + piece_[k]; }
  // Counted from the first row's first piece.
  __device__ int64_t number(int k) const { return first_number_ + number_in_tile(k); }

  static LaunchShape shape(int64_t rows, int64_t pieces) {
    int64_t tiles = 0;
    if (pieces > kTilePieces) {
      tiles = rows * ceil_div(pieces, kTilePieces);
    } else if (pieces > 0) {
      tiles = ceil_div(rows, kTilePieces / pieces);
    }
    return {{static_cast<uint32_t>(tiles), 1, 1}, kThreads};
  }

 private:
  __device__ static uint32_t number_in_tile(int k) {
    return static_cast<uint32_t>(k * kThreads + thread_index());
  }

  int64_t first_row_, first_piece_ = 0, first_number_;
  uint32_t count_, row_[kInFlight], piece_[kInFlight];
};

// ---- teams: for kernels that sum over a row ----

// The threads that share a row: 32, 64, 128 and so on. A block has block_size() / size teams.
class Team {
 public:
  __device__ Team(SharedArena& arena, int size)
      : size_(size),
        number_(thread_index() / size),
        parts_(arena.take<float>(block_size() / kWarpSize)) {}

  __device__ int size() const { return size_; }
  __device__ int number() const { return number_; }
  __device__ int thread() const { return thread_index() - number_ * size_; }

  // The sum over the team's threads, in each of them, always in the same order.
  __device__ float sum(float value) const {
    value = warp_sum(value);
    if (size_ > kWarpSize) {
      if (lane_index() == 0) {
        parts_[thread_index() / kWarpSize] = value;
      }
      sync_named(1 + number_, size_);
      const int warps = size_ / kWarpSize;
      value = 0;
      if (lane_index() < warps) {
        value = parts_[number_ * warps + lane_index()];
      }
      value = warp_sum(value);
      sync_named(1 + number_, size_);  // before parts_ is used again
    }
    return value;
  }

 private:
  int size_, number_;
  Shared<float> parts_;
};

// The size of the smallest team, of at most `most` threads, whose threads have at most pieces_each
// pieces of a row.
inline int smallest_team(int64_t pieces, int64_t pieces_each, int most) {
  int size = kWarpSize;
  while (size < most && size * pieces_each < pieces) {
    size *= 2;
  }
  return size;
}

inline LaunchShape teams_shape(int64_t rows, int team_size) {
  const int block = std::max(kThreads, team_size);
  const int64_t blocks = ceil_div(rows, block / team_size);
  return {{static_cast<uint32_t>(blocks), 1, 1}, block, shared_bytes<float>(block / kWarpSize)};
}

// ---- factors of the data's dtype or fp32 ----

template <typename T>
__device__ float gate_at(const Gate& gate, int64_t entry) {
  if (gate.data == nullptr) {
    return 1;
  }
  return gate.dtype == DType::kFloat32 ? static_cast<const float*>(gate.data)[entry]
                                       : to_float(static_cast<const T*>(gate.data)[entry]);
}

// x + factor * update
template <typename T, int kElements>
__device__ Piece<T, kElements> add_scaled(const Piece<T, kElements>& x,
                                          const Piece<T, kElements>& update, float factor) {
  float sums[kElements];
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    sums[i] = std::fma(factor, update[i], x[i]);
  }
  return Piece<T, kElements>::of(sums);
}

}  // namespace mor::cuda
