// What the lanes of a warp do together, and the number formats of the device.
#pragma once

#include <atomic>
#include <bit>
#include <cstdint>

#include "simt/executor.h"

namespace mor::simt {

void sync_warp(uint32_t mask, std::source_location site);
uint32_t ballot(bool predicate, uint32_t mask, std::source_location site);
uint32_t match_any(uint32_t value, uint32_t mask, std::source_location site);

// The value of the lane source(own lane).
template <typename T, typename Source>
T exchange(T value, uint32_t mask, const char* name, std::source_location site, Source&& source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  struct Operand {
    T value, result;
    int source;
  } own{value, value, source(thread_index() % 32)};
  collective(mask, name, site, &own, [](void* const* operands, uint32_t lanes) {
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
      auto* to = static_cast<Operand*>(operands[std::countr_zero(rest)]);
      if (to->source < 0 || to->source >= 32 || (lanes >> to->source & 1) == 0) {
        fail("a lane reads from lane " + std::to_string(to->source) + ", which takes no part");
      }
      to->result = static_cast<Operand*>(operands[to->source])->value;
    }
  });
  return own.result;
}

void load_matrix_x4(uint32_t (&fragment)[4], const void* row, bool transposed,
                    std::source_location site);
void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat,
                 std::source_location site);
void mma_16x8x8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     std::source_location site);

// Round to nearest even.
uint16_t float_to_bfloat(float x);
uint16_t float_to_half(float x);
float half_to_float(uint16_t bits);
// Round to nearest, ties away from zero, as cvt.rna.tf32 does.
uint32_t float_to_tf32(float x);

}  // namespace mor::simt
