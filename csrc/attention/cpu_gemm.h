// The matrix products of attention on packed tiles, in two kinds with one interface: FmaGemm in
// the accumulate type, for every dtype and instruction set, and DotGemm (cpu_dot_gemm.h) with bf16
// dot products.
#pragma once

#include "attention/cpu_micro.h"
#include "common/vec_math.h"
#include "common/vec_transpose.h"

namespace mor::MOR_ISA {

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// The rows of one head lie too far apart for the hardware to foresee them.
template <typename T>
inline void prefetch_row(const T* row, int64_t head_dim) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t d = 0; d < head_dim; d += kLine) {
    __builtin_prefetch(row + d);
  }
}

// How many rows ahead of the one that is packed.
inline constexpr int64_t kPrefetchRows = 24;

// Rows as the columns of a right-hand matrix in panels of kPanel columns: row(j) points to row j of
// head_dim elements of T; the depth from head_dim to padded and the columns from count to the end
// of the last panel are zero.
template <int64_t kPanel, typename T, typename RowAt>
void pack_as_columns(RowAt row, int64_t count, int64_t head_dim, int64_t padded,
                     accumulate_t<T>* to) {
  using Acc = accumulate_t<T>;
  constexpr int64_t kWidth = kLanes<Acc>;
  for (int64_t j0 = 0; j0 < round_up(count, kPanel); j0 += kWidth) {
    const T* rows[kWidth];
    for (int64_t j = 0; j < kWidth; ++j) {
      rows[j] = j0 + j < count ? row(j0 + j) : nullptr;
      if (j0 + j + kPrefetchRows < count) {
        prefetch_row(row(j0 + j + kPrefetchRows), head_dim);
      }
    }
    Acc* columns = to + j0 / kPanel * kPanel * padded + j0 % kPanel;
    for_each_vector<Acc>(head_dim, [&](int64_t d, auto lanes) {
      vec_t<Acc> square[kWidth];
      for (int64_t j = 0; j < kWidth; ++j) {
        square[j] = rows[j] ? load_lanes(rows[j] + d, lanes) : vec_t<Acc>{};
      }
      transpose(square);
      for (int64_t i = 0; i < lanes; ++i) {
        store<Acc>(columns + (d + i) * kPanel, square[i]);
      }
    });
    for (int64_t d = head_dim; d < padded; ++d) {
      store<Acc>(columns + d * kPanel, vec_t<Acc>{});
    }
  }
}

template <typename T>
struct FmaGemm {
  using Storage = T;
  using Acc = accumulate_t<T>;
  using In = Acc;  // packed element
  static constexpr int kExp2Degree = kExactExp2Degree<Acc>;

  using Micro = MicroKernel<Acc, MultiplyAdd<Acc>>;
  static constexpr int64_t kKeyBlock = 256;
  static constexpr int kPanel = Micro::kPanel;
  static constexpr int kTileRows = 4 * Micro::kRows;
  static constexpr int kDepthMultiple = 1;             // padding of a product's depth
  static constexpr int kColumnMultiple = kLanes<Acc>;  // padding of a product's columns

  struct Session {};  // what a thread holds while it multiplies

  // One row of head_dim elements to packed elements, times factor, zero up to padded.
  static void pack_row(const T* from, int64_t head_dim, int64_t padded, Acc factor, In* to) {
    for_each_vector<Acc>(head_dim, [&](int64_t d, auto lanes) {
      store_lanes(to + d, load_lanes(from + d, lanes) * factor, lanes);
    });
    std::fill(to + head_dim, to + padded, Acc{0});
  }

  // Rows as the columns of a right-hand matrix (K and V in Q K^T and dO V^T).
  template <typename RowAt>
  static Panels<In> pack_columns(RowAt row, int64_t count, int64_t head_dim, int64_t padded,
                                 In* to) {
    pack_as_columns<kPanel, T>(row, count, head_dim, padded, to);
    return {to, kPanel, padded * kPanel};
  }

  // Rows as the depth of a right-hand matrix (V in P V, K in dS K).
  template <typename RowAt>
  static Panels<In> pack_depth(RowAt row, int64_t count, int64_t head_dim, int64_t padded, In* to) {
    for (int64_t j = 0; j < count; ++j) {
      if (j + kPrefetchRows < count) {
        prefetch_row(row(j + kPrefetchRows), head_dim);
      }
      pack_row(row(j), head_dim, padded, Acc{1}, to + j * padded);
    }
    return {to, padded, kPanel};
  }

  // c[rows, columns] (+)= a[rows, depth] b[depth, columns].
  template <bool kAccumulate>
  static void multiply(int64_t rows, int64_t columns, int64_t depth, Rows<In> a, Panels<In> b,
                       Acc* c, int64_t c_stride) {
    Micro::template multiply<kAccumulate>(rows, columns, depth, a, b, c, c_stride);
  }
};

}  // namespace mor::MOR_ISA
