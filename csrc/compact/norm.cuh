// What gather_rms_norm and its backward share: a row spread over a team's threads.
#pragma once

#include "compact/rows.cuh"

namespace mor::cuda {

// A thread of a team has every so many-th piece of a row: kHeld of them at most, kept in registers,
// or, with kHeld == 0, any number, read again at each use.
template <typename T, int kElements, int kHeld>
class SpreadRow {
 public:
  static constexpr int kSlots = kHeld > 0 ? kHeld : 1;

  // Calls f(k, offset) for each of the thread's pieces: its slot, its first element's column.
  template <typename F>
  __device__ static void for_each(const Team& team, int64_t size, F&& f) {
    const int64_t first = int64_t{team.thread()} * kElements;
    const int step = team.size() * kElements;
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        if (const int64_t offset = first + k * step; offset < size) {
          f(k, offset);
        }
      }
    } else {
#pragma unroll 2
      for (int64_t offset = first; offset < size; offset += step) {
        f(0, offset);
      }
    }
  }

  // row: null for a row of zeros.
  __device__ SpreadRow(const T* row, const Team& team, int64_t size) : row_(row) {
    if constexpr (kHeld > 0) {
      if (row != nullptr) {
        for_each(team, size, [&](int k, int64_t offset) {
          held_[k] = Piece<T, kElements>::load(row + offset);
        });
      }
    }
  }

  __device__ Piece<T, kElements> get(int k, int64_t offset) const {
    if constexpr (kHeld > 0) {
      return held_[k];
    } else {
      return row_ ? Piece<T, kElements>::load(row_ + offset) : Piece<T, kElements>{};
    }
  }

 private:
  const T* row_;
  Piece<T, kElements> held_[kSlots] = {};
};

// A piece of the weight, which is of dtype T or fp32.
template <typename T, int kElements>
__device__ void load_weight(const void* weight, DType dtype, int64_t offset,
                            float (&to)[kElements]) {
  if (std::is_same_v<T, float> || dtype != DType::kFloat32) {
    const auto piece = Piece<T, kElements>::load(static_cast<const T*>(weight) + offset);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      to[i] = piece[i];
    }
  } else {
    constexpr int kPart = std::min(kElements, kVector16<float>);
#pragma unroll
    for (int part = 0; part < kElements; part += kPart) {
      const auto piece =
          Piece<float, kPart>::load(static_cast<const float*>(weight) + offset + part);
#pragma unroll
      for (int i = 0; i < kPart; ++i) {
        to[part + i] = piece[i];
      }
    }
  }
}

}  // namespace mor::cuda
