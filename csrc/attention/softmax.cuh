// The running softmax of a warp's rows (FlashAttention-2, arXiv 2307.08691, algorithm 1).
#pragma once

#include <cmath>

#include "attention/tile.cuh"

namespace mor::cuda {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Scores enter the softmax as exponents of 2: scores * factor, factor > 0. Made on the host: as a
// kernel's argument it takes no registers.
struct ScoreScale {
  float factor;
  bool negate, drop;  // the scores first: where softmax_scale is negative, or 0

  explicit ScoreScale(double softmax_scale) {
    constexpr double kLog2E = 1.4426950408889634;
    const float scaled = static_cast<float>(softmax_scale * kLog2E);
    negate = scaled < 0;
    drop = scaled == 0;
    factor = drop ? 1.0f : fabsf(scaled);
  }

  template <int kRowTiles, int kColumnTiles>
  __device__ void prepare(float (&scores)[kRowTiles][kColumnTiles][4]) const {
    if (!negate && !drop) {
      return;
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          scores[i][j][e] = drop ? 0.0f : -scores[i][j][e];
        }
      }
    }
  }
};

// f(i, half) for every row that a lane holds: 16 i + 8 half + lane / 4, with the rest of its quad.
template <int kRowTiles, typename F>
__device__ void for_each_row(F&& f) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      f(i, half);
    }
  }
}

// Scores of columns from limit(i, half) - column0 on become -inf.
template <int kRowTiles, int kColumnTiles, typename Limit>
__device__ void mask_scores(float (&scores)[kRowTiles][kColumnTiles][4], int32_t column0,
                            Limit&& limit) {
  for_each_row<kRowTiles>([&](int i, int half) {
    const int32_t end = limit(i, half) - column0;
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (accumulator_column(j, e) >= end) {
          scores[i][j][2 * half + e] = -kInfinity;
        }
      }
    }
  });
}

// What is known of a row after some of its keys. factor: ScoreScale's.
struct RowState {
  float maximum;  // of the scores; -inf: none was seen
  float sum;      // of the weights, relative to the maximum

  // What summed up values are multiplied by: a row that saw nothing gives 0.
  __device__ float inverse_sum() const { return sum == 0 ? 0.0f : 1.0f / sum; }

  // The natural logarithm of the denominator, in double: an error here would scale every weight
  // that the backward pass recomputes.
  __device__ float lse(float factor) const {
    constexpr double kLn2 = 0.6931471805599453;
    const double log2_sum = double{maximum} * factor + double{log2f(sum)};
    return sum == 0 ? -kInfinity : static_cast<float>(log2_sum * kLn2);
  }

  // What weights are multiplied by to be relative to a maximum of several states.
  __device__ float rescale(float top, float factor) const {
    return fast_exp2((maximum - finite(top)) * factor);
  }

  // What weights are relative to where nothing was seen yet: any number will do.
  __device__ static float finite(float maximum) { return maximum == -kInfinity ? 0 : maximum; }
};

template <int kRowTiles>
struct Softmax {
  // From here on the rounding of an exponent, 2^-24 of it, is more than 2^-17.
  static constexpr float kFarExponent = 128;

  float maximum[kRowTiles][2];  // of the scores so far; -inf: none was seen
  float sum[kRowTiles][2];      // this lane's part of the denominator, relative to the maximum

  __device__ Softmax() {
    for_each_row<kRowTiles>([&](int i, int half) {
      maximum[i][half] = -kInfinity;
      sum[i][half] = 0;
    });
  }

  // Turns scores into weights relative to the new maximum, and rescales what was summed up so far.
  // One fma gives an exponent, but its maximum * factor is rounded: where that would show, in fp32
  // (kExact) and where exponents are large, the difference is taken first.
  template <bool kExact, int kColumnTiles, int kOutTiles>
  __device__ void update(float (&scores)[kRowTiles][kColumnTiles][4],
                         float (&out)[kRowTiles][kOutTiles][4], float factor) {
    for_each_row<kRowTiles>([&](int i, int half) {
      float top = -kInfinity;
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        top = fmaxf(top, fmaxf(scores[i][j][2 * half], scores[i][j][2 * half + 1]));
      }
      top = fmaxf(top, shuffle_xor(top, 1));
      top = fmaxf(top, shuffle_xor(top, 2));
      const float highest = fmaxf(maximum[i][half], top);
      if (any_lane(highest != maximum[i][half])) {  // rare after the first tiles
        const float keep = state(i, half).rescale(highest, factor);
        sum[i][half] *= keep;
#pragma unroll
        for (int j = 0; j < kOutTiles; ++j) {
          out[i][j][2 * half] *= keep;
          out[i][j][2 * half + 1] *= keep;
        }
        maximum[i][half] = highest;
      }
      const float base = RowState::finite(highest), shift = base * factor;
      const bool exact = kExact || fabsf(shift) >= kFarExponent;
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& weight = scores[i][j][2 * half + e];
          weight = exact ? (weight - base) * factor : fmaf(weight, factor, -shift);
        }
      }
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& weight = scores[i][j][2 * half + e];
          weight = fast_exp2(weight);
          sum[i][half] += weight;
        }
      }
    });
  }

  // After the last update: every lane of a quad gets the whole denominator.
  __device__ void finish() {
    for_each_row<kRowTiles>([&](int i, int half) {
      sum[i][half] += shuffle_xor(sum[i][half], 1);
      sum[i][half] += shuffle_xor(sum[i][half], 2);
    });
  }

  __device__ RowState state(int i, int half) const { return {maximum[i][half], sum[i][half]}; }
};

}  // namespace mor::cuda
