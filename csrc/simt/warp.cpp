#include "simt/warp.h"

#include <cmath>
#include <cstring>

#include "simt/block.h"
#include "simt/shared.h"

namespace mor::simt {
namespace {

template <typename F>
void for_each_lane(uint32_t mask, F&& f) {
  for (; mask != 0; mask &= mask - 1) {
    f(std::countr_zero(mask));
  }
}

struct MmaOperand {
  const uint32_t *a, *b;
  float* c;
};

// Rounds towards zero, as tensor cores do with their sums.
float truncate(double x) {
  const auto nearest = static_cast<float>(x);
  const bool beyond = std::isfinite(nearest) && std::abs(double{nearest}) > std::abs(x);
  return beyond ? std::bit_cast<float>(std::bit_cast<uint32_t>(nearest) - 1) : nearest;
}

// c += a b by all lanes, for rows of a and columns of b of 8 words, of one or two elements each:
// kDepth elements. The words of a lane are those of PTX's fragments.
template <int kDepth, typename Decode>
void multiply(void* const* operands, Decode&& decode) {
  using Row [[gnu::vector_size(64)]] = double;
  uint32_t a_words[16][8], b_words[8][8];  // b: by column
  Row b[kDepth], c[16];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto [a, b, c_own] = *static_cast<const MmaOperand*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      a_words[g + i % 2 * 8][t + i / 2 * 4] = a[i];
      c[g + i / 2 * 8][2 * t + i % 2] = c_own[i];
    }
    for (int i = 0; i < 2; ++i) {
      b_words[g][t + i * 4] = b[i];
    }
  }
  float a[16][kDepth], b_columns[8][kDepth];
  decode(&a_words[0][0], &a[0][0], 16 * kDepth);
  decode(&b_words[0][0], &b_columns[0][0], 8 * kDepth);
  for (int k = 0; k < kDepth; ++k) {
    for (int j = 0; j < 8; ++j) {
      b[k][j] = b_columns[j][k];
    }
  }
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < kDepth; ++k) {
      c[i] += double{a[i][k]} * b[k];
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) {
      static_cast<const MmaOperand*>(operands[lane])->c[i] =
          truncate(c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
    }
  }
}

// The 16-bit elements of words, low half first.
template <typename Decode>
void decode_16bit(const uint32_t* words, float* elements, int count, Decode&& decode) {
  for (int i = 0; i < count; i += 2) {
    elements[i] = decode(static_cast<uint16_t>(words[i / 2]));
    elements[i + 1] = decode(static_cast<uint16_t>(words[i / 2] >> 16));
  }
}

}  // namespace

void sync_warp(uint32_t mask, Site site) {
  collective(mask, "sync_warp", site, nullptr, [](void* const*, uint32_t lanes) {
    if (lanes == running_warp().lanes) {  // the races that a part of a warp orders stay unknown
      current->races.warp_barrier(thread_index() / kWarp);
    }
  });
}

uint32_t ballot(bool predicate, uint32_t mask, Site site) {
  uint32_t own = predicate ? 1 : 0;
  collective(mask, "ballot", site, &own, [](void* const* operands, uint32_t lanes) {
    uint32_t votes = 0;
    for_each_lane(lanes,
                  [&](int lane) { votes |= *static_cast<uint32_t*>(operands[lane]) << lane; });
    for_each_lane(lanes, [&](int lane) { *static_cast<uint32_t*>(operands[lane]) = votes; });
  });
  return own;
}

uint32_t match_any(uint32_t value, uint32_t mask, Site site) {
  struct Operand {
    uint32_t value, same;
  } own{value, 0};
  collective(mask, "match_any", site, &own, [](void* const* operands, uint32_t lanes) {
    while (lanes != 0) {
      const uint32_t first = static_cast<Operand*>(operands[std::countr_zero(lanes)])->value;
      uint32_t same = 0;
      for_each_lane(lanes, [&](int lane) {
        same |= uint32_t{static_cast<Operand*>(operands[lane])->value == first} << lane;
      });
      for_each_lane(same, [&](int lane) { static_cast<Operand*>(operands[lane])->same = same; });
      lanes &= ~same;
    }
  });
  return own.same;
}

uint64_t exchange_bits(uint64_t value, int source, uint32_t mask, const char* name, Site site) {
  struct Operand {
    uint64_t value, result;
    int source;
    Site site;
  } own{value, 0, source & (kWarp - 1), site};
  collective(mask, name, site, &own, [](void* const* operands, uint32_t lanes) {
    for_each_lane(lanes, [&](int lane) {
      auto* to = static_cast<Operand*>(operands[lane]);
      if ((lanes >> to->source & 1) == 0) {
        fail("a lane reads from lane " + std::to_string(to->source) + ", which takes no part",
             to->site, thread_of_lane(lane));
      }
      to->result = static_cast<Operand*>(operands[to->source])->value;
    });
  });
  return own.result;
}

void load_matrix_x4(uint32_t (&fragment)[4], const void* row, bool transposed, Site site) {
  struct Operand {
    const void* row;
    uint32_t* fragment;
    bool transposed;
    Site site;
  } own{row, fragment, transposed, site};
  collective(0xffffffffu, "load_matrix_x4", site, &own, [](void* const* operands, uint32_t) {
    uint16_t matrices[4][8][8];
    for (int lane = 0; lane < kWarp; ++lane) {
      const auto* from = static_cast<const Operand*>(operands[lane]);
      touch_shared(from->row, 16, Access::kRead, from->site, thread_of_lane(lane));
      std::memcpy(matrices[lane / 8][lane % 8], from->row, 16);
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      const auto* to = static_cast<const Operand*>(operands[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int m = 0; m < 4; ++m) {
        const auto at = [&](int column) {
          return to->transposed ? matrices[m][column][g] : matrices[m][g][column];
        };
        to->fragment[m] = at(2 * t) | static_cast<uint32_t>(at(2 * t + 1)) << 16;
      }
    }
  });
}

void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat,
                 Site site) {
  MmaOperand own{a, b, c};
  if (bfloat) {
    collective(0xffffffffu, "mma_16x8x16", site, &own, [](void* const* operands, uint32_t) {
      multiply<16>(operands, [](const uint32_t* words, float* elements, int count) {
        decode_16bit(words, elements, count, [](uint16_t bits) {
          return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
        });
      });
    });
  } else {
    collective(0xffffffffu, "mma_16x8x16", site, &own, [](void* const* operands, uint32_t) {
      multiply<16>(operands, [](const uint32_t* words, float* elements, int count) {
        decode_16bit(words, elements, count, half_to_float);
      });
    });
  }
}

void mma_16x8x8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  MmaOperand own{a, b, c};
  collective(0xffffffffu, "mma_16x8x8_tf32", site, &own, [](void* const* operands, uint32_t) {
    multiply<8>(operands, [](const uint32_t* words, float* elements, int count) {
      for (int i = 0; i < count; ++i) {  // the hardware reads the upper 19 bits
        elements[i] = std::bit_cast<float>(words[i] & 0xffffe000u);
      }
    });
  });
}

}  // namespace mor::simt
