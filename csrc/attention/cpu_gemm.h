// The matrix products of attention on packed tiles, in two kinds with one interface: FmaGemm in
// the accumulate type, for every dtype and instruction set, and DotGemm (cpu_bf16.h) with bf16
// dot products.
#pragma once

#include <algorithm>

#include "common/vec_math.h"

namespace mor::MOR_ISA {

// The right-hand matrix of a product, in panels of kPanel columns: element (k, panel * kPanel + c)
// is data[panel * panel_stride + k * row_stride + c].
template <typename In>
struct Panels {
  const In* data;
  int64_t row_stride, panel_stride;
};

// The left-hand matrix; element (r, k) is data[r * row_stride + k * depth_stride].
template <typename In>
struct Rows {
  const In* data;
  int64_t row_stride, depth_stride = 1;
};

template <typename T>
struct FmaGemm {
  using Storage = T;
  using Acc = accumulate_t<T>;
  using In = Acc;  // packed element
  static constexpr int kExp2Degree = kExactExp2Degree<Acc>;

#if defined(__AVX512F__)
  static constexpr int kPanelVectors = 4;
#else
  static constexpr int kPanelVectors = 2;
#endif
  static constexpr int kMicroRows = 6;  // kMicroRows * kPanelVectors accumulators in registers
  static constexpr int kPanel = kPanelVectors * kLanes<Acc>;
  static constexpr int kTileRows = 4 * kMicroRows;
  static constexpr int kDepthMultiple = 1;             // padding of a product's depth
  static constexpr int kColumnMultiple = kLanes<Acc>;  // padding of a product's columns
  static constexpr int64_t kDepthBlock = 128;          // so that a panel's block stays in L1

  // One row of head_dim elements to packed elements, times factor, zero up to padded.
  static void pack_row(const T* from, int64_t head_dim, int64_t padded, Acc factor, In* to) {
    for_each_vector<Acc>(head_dim, [&](int64_t d, auto lanes) {
      store_lanes(to + d, load_lanes(from + d, lanes) * factor, lanes);
    });
    std::fill(to + head_dim, to + padded, Acc{0});
  }

  // Rows as the columns of a right-hand matrix (K and V in Q K^T and dO V^T): row(j) points to
  // row j, count <= a multiple of kPanel rows are packed and the rest of the last panel is zero.
  template <typename RowAt>
  static Panels<In> pack_columns(RowAt row, int64_t count, int64_t head_dim, int64_t padded,
                                 In* to) {
    for (int64_t j0 = 0; j0 < count; j0 += kPanel) {
      In* panel = to + j0 * padded;
      for (int64_t j = 0; j < kPanel; ++j) {
        if (j0 + j >= count) {
          for (int64_t d = 0; d < padded; ++d) {
            panel[d * kPanel + j] = 0;
          }
          continue;
        }
        const T* from = row(j0 + j);
        for_each_vector<Acc>(head_dim, [&](int64_t d, auto lanes) {
          const vec_t<Acc> x = load_lanes(from + d, lanes);
          for (int64_t i = 0; i < lanes; ++i) {
            panel[(d + i) * kPanel + j] = x[i];
          }
        });
        for (int64_t d = head_dim; d < padded; ++d) {
          panel[d * kPanel + j] = 0;
        }
      }
    }
    return {to, kPanel, padded * kPanel};
  }

  // Rows as the depth of a right-hand matrix (V in P V, K in dS K).
  template <typename RowAt>
  static Panels<In> pack_depth(RowAt row, int64_t count, int64_t head_dim, int64_t padded, In* to) {
    for (int64_t j = 0; j < count; ++j) {
      pack_row(row(j), head_dim, padded, Acc{1}, to + j * padded);
    }
    return {to, padded, kPanel};
  }

  static void store_weights(In* to, vec_t<Acc> p) { store<Acc>(to, p); }

  // c[rows, columns] (+)= a[rows, depth] b[depth, columns]; columns a multiple of
  // kColumnMultiple. An element's sum runs over depth in order, whatever the tile around it.
  template <bool kAccumulate>
  static void multiply(int64_t rows, int64_t columns, int64_t depth, Rows<In> a, Panels<In> b,
                       Acc* c, int64_t c_stride) {
    for (int64_t c0 = 0; c0 < columns; c0 += kPanel) {
      const In* panel = b.data + c0 / kPanel * b.panel_stride;
      const int64_t vectors = std::min<int64_t>(kPanelVectors, (columns - c0) / kLanes<Acc>);
      for (int64_t k0 = 0; k0 < depth; k0 += kDepthBlock) {
        const int64_t block = std::min(kDepthBlock, depth - k0);
        for (int64_t r0 = 0; r0 < rows; r0 += kMicroRows) {
          const Micro micro = choose(std::min<int64_t>(kMicroRows, rows - r0), vectors);
          micro({a.data + r0 * a.row_stride + k0 * a.depth_stride, a.row_stride, a.depth_stride},
                panel + k0 * b.row_stride, b.row_stride, block, c + r0 * c_stride + c0, c_stride,
                kAccumulate || k0 > 0);
        }
      }
    }
  }

 private:
  using Micro = void (*)(Rows<In>, const In*, int64_t, int64_t, Acc*, int64_t, bool);

  template <int kRows, int kVectors>
  static void micro(Rows<In> a, const In* b, int64_t b_stride, int64_t depth, Acc* c,
                    int64_t c_stride, bool accumulate) {
    constexpr int kWidth = kLanes<Acc>;
    vec_t<Acc> sum[kRows][kVectors];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        sum[r][v] = accumulate ? load<Acc>(c + r * c_stride + v * kWidth) : vec_t<Acc>{};
      }
    }
    for (int64_t k = 0; k < depth; ++k) {
      vec_t<Acc> right[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        right[v] = load<Acc>(b + k * b_stride + v * kWidth);
      }
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const vec_t<Acc> left = splat(a.data[r * a.row_stride + k * a.depth_stride]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          sum[r][v] += left * right[v];
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        store<Acc>(c + r * c_stride + v * kWidth, sum[r][v]);
      }
    }
  }

  template <int kRows>
  static Micro choose_vectors(int64_t vectors) {
    if constexpr (kPanelVectors == 4) {
      if (vectors >= 3) {
        return vectors == 4 ? micro<kRows, 4> : micro<kRows, 3>;
      }
    }
    return vectors == 2 ? micro<kRows, 2> : micro<kRows, 1>;
  }

  static Micro choose(int64_t rows, int64_t vectors) {
    switch (rows) {
      case 1:
        return choose_vectors<1>(vectors);
      case 2:
        return choose_vectors<2>(vectors);
      case 3:
        return choose_vectors<3>(vectors);
      case 4:
        return choose_vectors<4>(vectors);
      case 5:
        return choose_vectors<5>(vectors);
      default:
        return choose_vectors<6>(vectors);
    }
  }
};

}  // namespace mor::MOR_ISA
