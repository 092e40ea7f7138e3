// exp2 on vectors.
#pragma once

#include "common/vec.h"

namespace mor::MOR_ISA {

// Minimax polynomials of 2^f on [-0.5, 0.5] (Remez, relative error in the comment).
template <typename A, int kDegree>
struct Exp2Polynomial;
template <>
struct Exp2Polynomial<float, 4> {  // 2.6e-6
  static constexpr float kCoefficients[] = {0.9999992614f, 0.6931218147f, 0.2402474482f,
                                            0.05591786031f, 0.009570102015f};
};
template <>
struct Exp2Polynomial<float, 6> {  // 1.9e-9
  static constexpr float kCoefficients[] = {1.000000001f,    0.6931472057f,   0.2402264689f,
                                            0.05550328777f,  0.009618488957f, 0.001339993121f,
                                            0.0001534581216f};
};
template <>
struct Exp2Polynomial<double, 11> {  // 3.1e-18
  static constexpr double kCoefficients[] = {
      0.999999999999999997,   0.69314718055994533,      0.240226506959101562,
      0.0555041086648199215,  0.00961812910758833508,   0.00133335581467899503,
      0.00015403530462514613, 0.0000152527334899608046, 1.3215433089594629e-6,
      1.01781980333285277e-7, 7.07410562624565937e-9,   4.43528094461033616e-10};
};

template <typename A>
inline constexpr int kExactExp2Degree = sizeof(A) == 8 ? 11 : 6;

// 2^x for x <= 0 up to rounding; exactly 0 for x = -inf;
// NaN stays NaN.
template <typename A, int kDegree = kExactExp2Degree<A>>
inline vec_t<A> exp2_nonpositive(vec_t<A> x) {
  constexpr const A* kC = Exp2Polynomial<A, kDegree>::kCoefficients;
#if defined(__AVX512F__)
  // Two instructions do all the work on the exponent: x - round(x), and * 2^round(x).
  if constexpr (sizeof(A) == 4) {
    const auto fraction = (vec_t<A>)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
    vec_t<A> power = splat(kC[kDegree]);
    for (int k = kDegree - 1; k >= 0; --k) {
      power = power * fraction + kC[k];
    }
    return (vec_t<A>)_mm512_scalef_ps((__m512)power, (__m512)(x - fraction));
  }
#endif
  constexpr int kMantissa = VecTraits<A>::kMantissaBits;
  constexpr A kBias = static_cast<A>((1 << (8 * sizeof(A) - kMantissa - 2)) - 1);
  // Adding it leaves round(x) + bias in the low bits of the sum's mantissa.
  constexpr A kMagic = static_cast<A>(3ll << (kMantissa - 1)) + kBias;
  x = max<A>(x, splat<A>(-kBias));
  const vec_t<A> shifted = x + kMagic;
  const vec_t<A> fraction = x - (shifted - kMagic);
  vec_t<A> power = splat(kC[kDegree]);
  for (int k = kDegree - 1; k >= 0; --k) {
    power = power * fraction + kC[k];
  }
  return power * bits_as<vec_t<A>>(bits_as<int_vec_t<A>>(shifted) << kMantissa);
}

}  // namespace mor::MOR_ISA
