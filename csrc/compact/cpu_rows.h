// Writing whole rows, in the cache or past it.
#pragma once

#include <algorithm>

#include "common/vec.h"

namespace mor::MOR_ISA {

// Writes the rows of one output. An output larger than the cache is written past it: a row would
// be gone again before its reader comes, and would have pushed out inputs. Not so from 32 MiB on,
// where glibc maps fresh pages at each allocation: the kernel has just zeroed them in the cache,
// and to stream over them costs more than it saves.
class RowWriter {
 public:
  explicit RowWriter(int64_t output_bytes)
      : stream_(output_bytes > kStreamBytes && output_bytes < kMappedBytes) {}

  template <typename T>
  void copy(T* to, const T* from, int64_t size) const {
    if (stream_) {
      stream_copy(to, from, size * static_cast<int64_t>(sizeof(T)));
    } else {
      std::memcpy(to, from, static_cast<size_t>(size) * sizeof(T));
    }
  }

  template <typename T>
  void zero(T* to, int64_t size) const {
    compute(to, size, [](T* out, int64_t, int64_t count) {
      std::memset(out, 0, static_cast<size_t>(count) * sizeof(T));
    });
  }

  // produce(out, begin, count) writes the elements [begin, begin + count) of the row to out.
  template <typename T, typename F>
  void compute(T* to, int64_t size, F&& produce) const {
    if (!stream_) {
      return produce(to, 0, size);
    }
    constexpr int64_t kPiece = 4096 / sizeof(T);
    alignas(64) T piece[kPiece];
    for (int64_t begin = 0; begin < size; begin += kPiece) {
      const int64_t count = std::min(kPiece, size - begin);
      produce(piece, begin, count);
      stream_copy(to + begin, piece, count * static_cast<int64_t>(sizeof(T)));
    }
  }

  // After the last row of a thread.
  void finish() const {
    if (stream_) {
      fence();
    }
  }

 private:
  static constexpr int64_t kMappedBytes = 32 << 20;
  bool stream_;
};

// The sum of term(offset, lanes) over a row. Four sums run side by side: they hide the latency of
// addition and, being shorter, round less.
template <typename A, typename F>
A sum_row(int64_t size, F&& term) {
  constexpr int64_t kStep = 4 * kLanes<A>;
  constexpr std::integral_constant<int64_t, kLanes<A>> kAll;
  vec_t<A> sums[4] = {};
  int64_t i = 0;
  for (; i + kStep <= size; i += kStep) {
    for (int j = 0; j < 4; ++j) {
      sums[j] += term(i + j * kLanes<A>, kAll);
    }
  }
  for_each_vector<A>(size - i, [&](int64_t j, auto lanes) { sums[0] += term(i + j, lanes); });
  return sum_lanes<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Rows that a thread takes at least: some 64 KiB of them.
inline int64_t row_grain(int64_t row_bytes) {
  return 1 + 65536 / (row_bytes + 1);
}

}  // namespace mor::MOR_ISA
