// Transposition of a square of vector registers, and what follows from it.
#pragma once

#include <utility>

#include "common/vec.h"

namespace mor::MOR_ISA {

// The lanes of a (0..n-1) and b (n..2n-1) that kLanesOf names.
template <int... kLanesOf, typename V>
inline V shuffle(V a, V b) {
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define MOR_HAS_SHUFFLEVECTOR
#endif
#endif
#if defined(MOR_HAS_SHUFFLEVECTOR)
  return __builtin_shufflevector(a, b, kLanesOf...);
#else
  using Mask = int_vec_t<std::remove_cvref_t<decltype(a[0])> >;
  return __builtin_shuffle(a, b, Mask{kLanesOf...});
#endif
}

// Swaps the off-diagonal squares of size kStep in every 2 kStep x 2 kStep square of two rows.
template <int kStep, typename V, int... kLane>
inline void swap_squares(V& a, V& b, std::integer_sequence<int, kLane...>) {
  constexpr int kCount = sizeof...(kLane);
  const V low = shuffle<(kLane & kStep ? kCount + kLane - kStep : kLane)...>(a, b);
  b = shuffle<(kLane & kStep ? kCount + kLane : kLane + kStep)...>(a, b);
  a = low;
}

template <int kStep, typename V, size_t kCount>
inline void transpose_steps(V (&rows)[kCount]) {
  if constexpr (kStep < static_cast<int>(kCount)) {
#pragma GCC unroll 16
    for (int i = 0; i < static_cast<int>(kCount); ++i) {
      if ((i & kStep) == 0) {
        swap_squares<kStep>(rows[i], rows[i + kStep],
                            std::make_integer_sequence<int, static_cast<int>(kCount)>{});
      }
    }
    transpose_steps<2 * kStep>(rows);
  }
}

// rows[i][j] becomes rows[j][i]; as many rows as a vector has lanes.
template <typename V, size_t kCount>
inline void transpose(V (&rows)[kCount]) {
  static_assert(kCount * sizeof(rows[0][0]) == sizeof(V));
  transpose_steps<1>(rows);
}

// Lane i of the result is combine over the lanes of rows[i], in a tree of fixed order.
template <typename A, typename Combine>
inline vec_t<A> reduce_each(vec_t<A> (&rows)[kLanes<A>], Combine combine) {
  transpose(rows);
#pragma GCC unroll 4
  for (int width = kLanes<A> / 2; width > 0; width /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) {
      rows[i] = combine(rows[i], rows[i + width]);
    }
  }
  return rows[0];
}

}  // namespace mor::MOR_ISA
