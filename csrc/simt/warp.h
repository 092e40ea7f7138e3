// What the lanes of a warp do together, and the number formats of the device.
#pragma once

#include <atomic>
#include <bit>
#include <cstdint>
#include <type_traits>

#include "simt/executor.h"

namespace mor::simt {

void sync_warp(uint32_t mask, Site site);
uint32_t ballot(bool predicate, uint32_t mask, Site site);
uint32_t match_any(uint32_t value, uint32_t mask, Site site);

// The value of another lane, modulo 32.
uint64_t exchange_bits(uint64_t value, int source, uint32_t mask, const char* name, Site site);

// The value of the lane source(own lane).
template <typename T, typename Source>
T exchange(T value, uint32_t mask, const char* name, Site site, Source&& source) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  const uint64_t result =
      exchange_bits(std::bit_cast<Bits>(value), source(thread_index() % kWarp), mask, name, site);
  return std::bit_cast<T>(static_cast<Bits>(result));
}

void load_matrix_x4(uint32_t (&fragment)[4], const void* row, bool transposed, Site site);
void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat,
                 Site site);
void mma_16x8x8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site);

// Round to nearest even.
inline uint16_t float_to_bfloat(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  return x != x ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t float_to_half(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    return 0x7fff;
  }
  if (magnitude >= 0x477ff000) {  // 65520
    return static_cast<uint16_t>(sign | 0x7c00);
  }
  if (magnitude < 0x38800000) {  // 2^-14: in units of 2^-24, rounded by the addition
    const float units = std::bit_cast<float>(magnitude) * 0x1p24f + 0x1p23f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(units) & 0x7ff));
  }
  const uint32_t rebased = magnitude - (112 << 23);
  return static_cast<uint16_t>(sign | (rebased + 0xfff + (rebased >> 13 & 1)) >> 13);
}

inline float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  const uint32_t shifted = magnitude << 13;
  const uint32_t denormal = std::bit_cast<uint32_t>(static_cast<float>(magnitude) * 0x1p-24f);
  const uint32_t rebased = shifted + (magnitude >= 0x7c00 ? 224u << 23 : 112u << 23);
  return std::bit_cast<float>(sign | (magnitude < 0x400 ? denormal : rebased));
}

// Round to nearest, ties away from zero, as cvt.rna.tf32 does.
inline uint32_t float_to_tf32(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7f800000) == 0x7f800000) {
    return x != x ? 0x7fffffffu : bits;
  }
  return (bits + 0x1000) & 0xffffe000u;
}

}  // namespace mor::simt
