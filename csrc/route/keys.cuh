// Scores as unsigned integers of the same order, and the digits of those.
#pragma once

#include <algorithm>

#include "common/primitives.cuh"

namespace mor {

inline constexpr uint32_t kLargestKey = 0xffffffff;  // of every NaN; no other score has it

// Equal for -0.0 and 0.0. At least 1: 0 stands for no score.
MOR_PRIMITIVE uint32_t key_of(float score) {
  const auto bits = std::bit_cast<uint32_t>(score);
  const uint32_t key = static_cast<int32_t>(bits) < 0 ? 0 - bits : bits | 0x80000000;
  return score != score ? kLargestKey : key;
}

// ---- digits of 11 bits, the highest first: 11 + 11 + 10 ----

inline constexpr int kDigitBits = 11;
inline constexpr int kBins = 1 << kDigitBits;

// What 16-bit scores do not have is below the second digit: fp16 has 19 upper bits as fp32.
template <typename T>
inline constexpr int kDigits = sizeof(T) == 4 ? 3 : 2;

// The lowest bit of a digit. The last one shares a bit with the digit before, which is the same for
// all keys that are still looked at.
MOR_PRIMITIVE int digit_shift(int pass) {
  return std::max(32 - kDigitBits * (pass + 1), 0);
}

}  // namespace mor
