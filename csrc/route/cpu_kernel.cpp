// CPU kernels of the route family.
#include <algorithm>
#include <numeric>

#include "common/parallel.h"
#include "common/vec.h"
#include "route/params.h"

namespace mor::MOR_ISA {
namespace {

// ---- route_topk: scores become integers of the same order; the k-th largest is found by
// bisection over their values, each step one vectorised count, and one ordered scan emits ----

template <typename T>
struct ScoreBits;
template <>
struct ScoreBits<float> {
  using Key = int32_t;
  static constexpr Key kInfinity = 0x7f800000;
};
template <>
struct ScoreBits<double> {
  using Key = int64_t;
  static constexpr Key kInfinity = 0x7ff0000000000000;
};
template <>
struct ScoreBits<bfloat16> {
  using Key = int16_t;
  static constexpr Key kInfinity = 0x7f80;
};
template <>
struct ScoreBits<float16> {
  using Key = int16_t;
  static constexpr Key kInfinity = 0x7c00;
};

// Sign and magnitude to two's complement: -0.0 and 0.0 meet in 0. Every NaN is the largest key.
template <typename Key>
void make_keys(const Key* bits, Key* keys, int64_t count, Key infinity) {
  constexpr Key kLargest = std::numeric_limits<Key>::max();
  for (int64_t i = 0; i < count; ++i) {
    const Key magnitude = bits[i] & kLargest;
    const Key key = bits[i] < 0 ? -magnitude : magnitude;
    keys[i] = magnitude > infinity ? kLargest : key;
  }
}

template <typename Key>
int64_t count_at_least(const Key* keys, int64_t count, Key bound) {
  constexpr int64_t kBlock = 1 << 14;  // a block's count fits the narrowest key
  int64_t total = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, count);
    std::make_unsigned_t<Key> matches = 0;
    for (int64_t i = begin; i < end; ++i) {
      matches += keys[i] >= bound;
    }
    total += static_cast<int64_t>(matches);
  }
  return total;
}

// Selected are the keys above `key` and, in order, the first `ties` of those equal to it.
template <typename Key>
struct Threshold {
  Key key;
  int64_t ties;
};

// 0 < k <= count
template <typename Key>
Threshold<Key> find_threshold(const Key* keys, int64_t count, int64_t k) {
  Key low = keys[0], high = keys[0];
  for (int64_t i = 0; i < count; ++i) {
    low = std::min(low, keys[i]);
    high = std::max(high, keys[i]);
  }
  if (k == count) {
    return {low, count};
  }
  // At least k keys are >= low, fewer than k are > high.
  int64_t above_high = 0;
  while (low < high) {
    const Key middle = std::midpoint(high, low);  // rounds towards high, so it is above low
    const int64_t matches = count_at_least(keys, count, middle);
    if (matches == k) {
      return {middle, k};
    }
    if (matches > k) {
      low = middle;
    } else {
      high = middle - 1;
      above_high = matches;
    }
  }
  return {low, k - above_high};
}

template <typename Key>
void emit_rows(const Key* keys, Threshold<Key> threshold, int32_t row, int64_t k, int32_t* index) {
  for (int64_t emitted = 0; emitted < k; ++row, ++keys) {
    const bool tie = *keys == threshold.key && threshold.ties > 0;
    index[emitted] = row;  // stays if the row is selected, else the next one overwrites it
    threshold.ties -= tie;
    emitted += tie || *keys > threshold.key;
  }
}

template <typename T>
void route_topk_of(const RouteTopkParams& p) {
  using Key = typename ScoreBits<T>::Key;
  const auto* bits = static_cast<const Key*>(p.scores);
  auto* all_keys = static_cast<Key*>(p.scratch);
  const int64_t grain = 1 + 16384 / (p.rows / std::max<int64_t>(p.batch, 1) + 1);
  parallel_for(p.batch, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int32_t start = p.cu_seqlens[b];
      const int64_t length = p.cu_seqlens[b + 1] - start;
      const int64_t k = p.cu_seqlens_out[b + 1] - p.cu_seqlens_out[b];
      if (k == 0) {
        continue;
      }
      Key* keys = all_keys + start;
      make_keys(bits + start, keys, length, ScoreBits<T>::kInfinity);
      emit_rows(keys, find_threshold(keys, length, k), start, k, p.index + p.cu_seqlens_out[b]);
    }
  });
}

// ---- route_depth ----

template <typename T>
void choose_depths(const RouteDepthParams& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const auto* bias = static_cast<const A*>(p.bias);
  for (int64_t row = begin; row < end; ++row) {
    const T* logits = static_cast<const T*>(p.logits) + row * p.recursions;
    A best = -std::numeric_limits<A>::infinity();
    int32_t depth = 1;
    for (int32_t r = 0; r < p.recursions; ++r) {
      const A value = load_scalar(logits + r) + (bias ? bias[r] : A{0});
      const bool first_nan = value != value && best == best;
      if (value > best || first_nan) {
        best = value;
        depth = r + 1;
      }
    }
    p.depth[row] = depth;
  }
}

}  // namespace

void route_topk(const RouteTopkParams& p) {
  dispatch_dtype(p.dtype, [&]<typename T>() { route_topk_of<T>(p); });
}

void route_depth(const RouteDepthParams& p) {
  const int64_t grain = 1 + 16384 / p.recursions;
  dispatch_dtype(p.dtype, [&]<typename T>() {
    parallel_for(p.rows, grain,
                 [&](int64_t begin, int64_t end) { choose_depths<T>(p, begin, end); });
  });
  // A pass over the depths for each recursion: no counter is shared between threads.
  parallel_for(p.recursions, 1 + 65536 / (p.rows + 1), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const auto depth = static_cast<int32_t>(r + 1);
      p.load[r] = static_cast<int32_t>(std::count(p.depth, p.depth + p.rows, depth));
    }
  });
}

}  // namespace mor::MOR_ISA
