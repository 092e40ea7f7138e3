// Random numbers that are the same everywhere for the same seed.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace mor::engine::simulation {

// Depends on the order of the two.
inline uint64_t mix(uint64_t a, uint64_t b) {
  uint64_t x = a * 0x9e3779b97f4a7c15 + b;
  x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93;
  return x ^ (x >> 29);
}

class Random {
 public:
  explicit Random(uint64_t seed) : state_(mix(seed, 1)) {}

  uint64_t next() { return mix(state_ += 0x9e3779b97f4a7c15, 0); }
  // In [low, high].
  int32_t in(int32_t low, int32_t high) {
    return low + static_cast<int32_t>(next() % static_cast<uint64_t>(high - low + 1));
  }
  bool chance(double p) { return static_cast<double>(next() >> 11) < p * 0x1p53; }
  template <typename T>
  T one_of(std::initializer_list<T> choices) {
    return choices.begin()[in(0, static_cast<int32_t>(choices.size()) - 1)];
  }

 private:
  uint64_t state_;
};

}  // namespace mor::engine::simulation
