// The register-blocked product that every matrix of attention goes through.
#pragma once

#include <algorithm>

#include "common/vec.h"

namespace mor::MOR_ISA {

// The right-hand matrix of a product, in panels of a fixed number of columns: element (k, c) of
// panel i is data[i * panel_stride + k * row_stride + c].
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

template <typename Acc>
struct MultiplyAdd {
  static vec_t<Acc> apply(vec_t<Acc> left, vec_t<Acc> right, vec_t<Acc> sum) {
    return sum + left * right;
  }
};

// Step::apply(left, right, sum) is what one depth step adds to a vector of sums.
template <typename Acc, typename Step>
struct MicroKernel {
#if defined(__AVX512F__)
  static constexpr int kPanelVectors = 4;
#else
  static constexpr int kPanelVectors = 2;
#endif
  static constexpr int kRows = 6;  // kRows * kPanelVectors sums fit the registers
  static constexpr int kPanel = kPanelVectors * kLanes<Acc>;
  static constexpr int64_t kDepthBlock = 128;  // of a panel, stays in L1

  // c[rows, columns] (+)= a[rows, depth] b[depth, columns]; columns a multiple of
  // the vector's lanes. An element's sum runs over
  // depth in order, whatever the tile around it, and block by block: a long sum of short ones.
  template <bool kAccumulate>
  static void multiply(int64_t rows, int64_t columns, int64_t depth, Rows<Acc> a, Panels<Acc> b,
                       Acc* c, int64_t c_stride) {
    for (int64_t c0 = 0; c0 < columns; c0 += kPanel) {
      const Acc* panel = b.data + c0 / kPanel * b.panel_stride;
      const int64_t vectors = std::min<int64_t>(kPanelVectors, (columns - c0) / kLanes<Acc>);
      for (int64_t k0 = 0; k0 < depth; k0 += kDepthBlock) {
        const int64_t block = std::min(kDepthBlock, depth - k0);
        for (int64_t r0 = 0; r0 < rows; r0 += kRows) {
          const Micro micro = choose(std::min<int64_t>(kRows, rows - r0), vectors);
          micro({a.data + r0 * a.row_stride + k0 * a.depth_stride, a.row_stride, a.depth_stride},
                panel + k0 * b.row_stride, b.row_stride, block, c + r0 * c_stride + c0, c_stride,
                kAccumulate || k0 > 0);
        }
      }
    }
  }

 private:
  using Micro = void (*)(Rows<Acc>, const Acc*, int64_t, int64_t, Acc*, int64_t, bool);

  template <int kTall, int kVectors>
  static void micro(Rows<Acc> a, const Acc* b, int64_t b_stride, int64_t depth, Acc* c,
                    int64_t c_stride, bool accumulate) {
    constexpr int kWidth = kLanes<Acc>;
    vec_t<Acc> sum[kTall][kVectors] = {};
    for (int64_t k = 0; k < depth; ++k) {
      vec_t<Acc> right[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        right[v] = load<Acc>(b + k * b_stride + v * kWidth);
      }
#pragma GCC unroll 6
      for (int r = 0; r < kTall; ++r) {
        const vec_t<Acc> left = splat(a.data[r * a.row_stride + k * a.depth_stride]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          sum[r][v] = Step::apply(left, right[v], sum[r][v]);
        }
      }
    }
    for (int r = 0; r < kTall; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        Acc* to = c + r * c_stride + v * kWidth;
        store<Acc>(to, accumulate ? load<Acc>(to) + sum[r][v] : sum[r][v]);
      }
    }
  }

  template <int kTall>
  static Micro choose_vectors(int64_t vectors) {
    if constexpr (kPanelVectors == 4) {
      if (vectors >= 3) {
        return vectors == 4 ? micro<kTall, 4> : micro<kTall, 3>;
      }
    }
    return vectors == 2 ? micro<kTall, 2> : micro<kTall, 1>;
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
