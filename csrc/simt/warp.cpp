#include "simt/warp.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "simt/block.h"
#include "simt/shared.h"

namespace mor::simt {
namespace {

constexpr int kLanes = 32;

float bfloat_to_float(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

// Rounds towards zero, as tensor cores do with their sums.
float truncate(double x) {
  const auto nearest = static_cast<float>(x);
  const bool beyond = std::isfinite(nearest) && std::abs(double{nearest}) > std::abs(x);
  return beyond ? std::bit_cast<float>(std::bit_cast<uint32_t>(nearest) - 1) : nearest;
}

// c [16, 8] += a [16, depth] b [depth, 8], and the accumulators of all lanes.
template <int kDepth>
struct Product {
  float a[16][kDepth], b[kDepth][8], c[16][8];

  void multiply() {
    for (int i = 0; i < 16; ++i) {
      double sum[8];
      std::copy_n(c[i], 8, sum);
      for (int k = 0; k < kDepth; ++k) {
        for (int j = 0; j < 8; ++j) {
          sum[j] += double{a[i][k]} * double{b[k][j]};
        }
      }
      std::transform(sum, sum + 8, c[i], truncate);
    }
  }
};

struct MmaOperand {
  const uint32_t *a, *b;
  float* c;
};

// The accumulator element c[e] of a lane.
int row_of(int lane, int e) {
  return lane / 4 + (e / 2) * 8;
}
int column_of(int lane, int e) {
  return lane % 4 * 2 + e % 2;
}

template <int kDepth, typename LoadOperands>
void multiply_warp(void* const* operands, LoadOperands&& load) {
  Product<kDepth> product;
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto* own = static_cast<const MmaOperand*>(operands[lane]);
    load(product, lane, *own);
    for (int e = 0; e < 4; ++e) {
      product.c[row_of(lane, e)][column_of(lane, e)] = own->c[e];
    }
  }
  product.multiply();
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int e = 0; e < 4; ++e) {
      static_cast<MmaOperand*>(operands[lane])->c[e] =
          product.c[row_of(lane, e)][column_of(lane, e)];
    }
  }
}

template <typename Decode>
void mma_16bit(void* const* operands, Decode&& decode) {
  multiply_warp<16>(operands, [&](Product<16>& product, int lane, const MmaOperand& own) {
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      const auto element = [&](uint32_t pair) {
        return decode(static_cast<uint16_t>(pair >> (16 * half)));
      };
      for (int i = 0; i < 4; ++i) {
        product.a[g + i % 2 * 8][2 * t + half + i / 2 * 8] = element(own.a[i]);
      }
      for (int i = 0; i < 2; ++i) {
        product.b[2 * t + half + i * 8][g] = element(own.b[i]);
      }
    }
  });
}

}  // namespace

void sync_warp(uint32_t mask, std::source_location site) {
  collective(mask, "sync_warp", site, nullptr, [](void* const*, uint32_t lanes) {
    if (lanes == 0xffffffffu) {  // the races that a part of a warp orders stay unknown
      current_block().races.warp_barrier(thread_index() / kLanes);
    }
  });
}

uint32_t ballot(bool predicate, uint32_t mask, std::source_location site) {
  uint32_t own = predicate ? 1 : 0;
  collective(mask, "ballot", site, &own, [](void* const* operands, uint32_t lanes) {
    uint32_t votes = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      if ((lanes >> lane & 1) != 0) {
        votes |= *static_cast<uint32_t*>(operands[lane]) << lane;
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      if ((lanes >> lane & 1) != 0) {
        *static_cast<uint32_t*>(operands[lane]) = votes;
      }
    }
  });
  return own;
}

uint32_t match_any(uint32_t value, uint32_t mask, std::source_location site) {
  struct Operand {
    uint32_t value, same;
  } own{value, 0};
  collective(mask, "match_any", site, &own, [](void* const* operands, uint32_t lanes) {
    for (int i = 0; i < kLanes; ++i) {
      for (int j = 0; j < kLanes; ++j) {
        if ((lanes >> i & lanes >> j & 1) != 0) {
          auto* to = static_cast<Operand*>(operands[i]);
          const bool same = to->value == static_cast<Operand*>(operands[j])->value;
          to->same |= static_cast<uint32_t>(same) << j;
        }
      }
    }
  });
  return own.same;
}

void load_matrix_x4(uint32_t (&fragment)[4], const void* row, bool transposed,
                    std::source_location site) {
  struct Operand {
    const void* row;
    uint32_t* fragment;
    bool transposed;
  } own{row, fragment, transposed};
  collective(0xffffffffu, "load_matrix_x4", site, &own, [](void* const* operands, uint32_t) {
    uint16_t matrices[4][8][8];
    for (int lane = 0; lane < kLanes; ++lane) {
      const auto* from = static_cast<const Operand*>(operands[lane]);
      read_shared_as(thread_of_lane(lane), from->row, 16);
      std::memcpy(matrices[lane / 8][lane % 8], from->row, 16);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
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
                 std::source_location site) {
  MmaOperand own{a, b, c};
  if (bfloat) {
    collective(0xffffffffu, "mma_16x8x16", site, &own,
               [](void* const* operands, uint32_t) { mma_16bit(operands, bfloat_to_float); });
  } else {
    collective(0xffffffffu, "mma_16x8x16", site, &own,
               [](void* const* operands, uint32_t) { mma_16bit(operands, half_to_float); });
  }
}

void mma_16x8x8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     std::source_location site) {
  MmaOperand own{a, b, c};
  collective(0xffffffffu, "mma_16x8x8_tf32", site, &own, [](void* const* operands, uint32_t) {
    multiply_warp<8>(operands, [](Product<8>& product, int lane, const MmaOperand& from) {
      const int g = lane / 4, t = lane % 4;
      // The hardware reads the upper 19 bits.
      const auto element = [](uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000u); };
      for (int i = 0; i < 4; ++i) {
        product.a[g + i % 2 * 8][t + i / 2 * 4] = element(from.a[i]);
      }
      for (int i = 0; i < 2; ++i) {
        product.b[t + i * 4][g] = element(from.b[i]);
      }
    });
  });
}

uint16_t float_to_bfloat(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if (x != x) {
    return 0x7fff;
  }
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint16_t float_to_half(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const float magnitude = std::bit_cast<float>(bits & 0x7fffffffu);
  if (x != x) {
    return 0x7fff;
  }
  if (magnitude >= 65520.0f) {
    return sign | 0x7c00;
  }
  if (magnitude < 0x1p-14f) {  // denormal or zero: in units of 2^-24, rounded by the addition
    const float units = magnitude * 0x1p24f + 0x1p23f;
    return sign | static_cast<uint16_t>(std::bit_cast<uint32_t>(units) & 0x7ff);
  }
  const uint32_t rebased = (bits & 0x7fffffffu) - (112u << 23);
  return sign | static_cast<uint16_t>((rebased + 0xfff + (rebased >> 13 & 1)) >> 13);
}

float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  if (magnitude >= 0x7c00) {
    return std::bit_cast<float>(sign | 0x7f800000u | magnitude << 13);
  }
  // A half's bits as a float's are 2^112 times too small, denormals too.
  const float value = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | sign);
}

uint32_t float_to_tf32(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if (!std::isfinite(x)) {
    return x != x ? 0x7fffffffu : bits;
  }
  return (bits + 0x1000) & 0xffffe000u;
}

}  // namespace mor::simt
