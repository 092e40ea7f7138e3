// Products of bf16 tiles with fp32 sums, by the machine's bf16 dot products: AMX tiles, or
// AVX-512 BF16. The interface is that of FmaGemm (cpu_gemm.h).
//
// Right-hand panels hold pairs of depth neighbours: element (k, c) of a panel is
// data[k / 2 * row_stride + 2 * c + k % 2], so one 32-bit lane feeds one dot product.
#pragma once

#include "attention/cpu_gemm.h"

namespace mor::MOR_ISA {

struct DotGemm {
  using Storage = bfloat16;
  using Acc = float;
  using In = bfloat16;
  static constexpr int kExp2Degree = 4;  // 2.6e-6, far below the 2^-9 of a bf16 weight
  static constexpr int64_t kKeyBlock = 256;
#if defined(__AMX_BF16__)
  static constexpr int kPanel = 16;  // a right-hand tile is one contiguous KiB
  static constexpr int kTileRows = 32;
#else
  static constexpr int kPanel = FmaGemm<float>::kPanel;
  static constexpr int kTileRows = FmaGemm<float>::kTileRows;
#endif
  static constexpr int kDepthMultiple = 32;  // the 64 bytes of a tile's row
  static constexpr int kColumnMultiple = 16;

  // The sign of factor is all that a bf16 element can be multiplied by without rounding.
  static void pack_row(const bfloat16* from, int64_t head_dim, int64_t padded, float factor,
                       bfloat16* to) {
    if (factor == 1) {
      std::copy_n(from, head_dim, to);
      std::fill(to + head_dim, to + padded, bfloat16{0});
      return;
    }
    for_each_vector<float>(head_dim, [&](int64_t d, auto lanes) {
      store_lanes(to + d, load_lanes(from + d, lanes) * factor, lanes);
    });
    std::fill(to + head_dim, to + padded, bfloat16{0});
  }

  // A row's pairs are 32-bit words: packing them is packing a float row of half the length.
  template <typename RowAt>
  static Panels<In> pack_columns(RowAt row, int64_t count, int64_t head_dim, int64_t padded,
                                 In* to) {
    const auto pairs = [&](int64_t j) { return reinterpret_cast<const float*>(row(j)); };
    pack_as_columns<kPanel, float>(pairs, count, head_dim / 2, padded / 2,
                                   reinterpret_cast<float*>(to));
    return {to, 2 * kPanel, padded * kPanel};
  }

  // Interleaves rows 2 j and 2 j + 1; the depth from count to a multiple of kDepthMultiple and the
  // columns from head_dim to padded are zero.
  template <typename RowAt>
  static Panels<In> pack_depth(RowAt row, int64_t count, int64_t head_dim, int64_t padded, In* to) {
    const int64_t depth = round_up(count, kDepthMultiple);
    const int64_t panel_stride = depth * kPanel;
    for (int64_t j = 0; j < depth; j += 2) {
      const bfloat16* even = j < count ? row(j) : nullptr;
      const bfloat16* odd = j + 1 < count ? row(j + 1) : nullptr;
      for (int64_t ahead = j + kPrefetchRows; ahead < std::min(j + kPrefetchRows + 2, count);
           ++ahead) {
        prefetch_row(row(ahead), head_dim);
      }
      const auto word = [](const bfloat16* from, int64_t d, auto lanes) {
        return from ? bits_as<UInt>(load_lanes(from + d, lanes)) : UInt{};
      };
      const auto at = [&](int64_t d) {
        return to + d / kPanel * panel_stride + j * kPanel + 2 * (d % kPanel);
      };
      for_each_vector<float>(head_dim, [&](int64_t d, auto lanes) {
        const UInt pairs = word(even, d, lanes) >> 16 | word(odd, d, lanes);
        std::memcpy(at(d), &pairs, sizeof(pairs));
      });
      for (int64_t d = round_up(head_dim, kLanes<float>); d < padded; d += kLanes<float>) {
        std::memset(at(d), 0, sizeof(UInt));
      }
    }
    return {to, 2 * kPanel, panel_stride};
  }

#if defined(__AMX_BF16__)
  // Eight tiles of 16 rows of 64 bytes. Released at the end: other users of the tiles on this
  // thread configure them anew.
  struct Session {
    Session() {
      struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } config;
      _tile_loadconfig(&config);
    }
    ~Session() { _tile_release(); }
  };

  // Whole tiles: rows up to the next multiple of 32 are read and written.
  template <bool kAccumulate>
  static void multiply(int64_t rows, int64_t columns, int64_t depth, Rows<In> a, Panels<In> b,
                       float* c, int64_t c_stride) {
    for (int64_t c0 = 0; c0 < columns; c0 += 2 * kPanel) {
      const In* right = b.data + c0 / kPanel * b.panel_stride;
      for (int64_t r0 = 0; r0 < rows; r0 += 32) {
        const Rows<In> left{a.data + r0 * a.row_stride, a.row_stride};
        float* to = c + r0 * c_stride + c0;
        if (c0 + kPanel < columns) {
          multiply_tiles<kAccumulate, true>(depth, left, right, b.panel_stride, to, c_stride);
        } else {
          multiply_tiles<kAccumulate, false>(depth, left, right, b.panel_stride, to, c_stride);
        }
      }
    }
  }

 private:
  // Two tiles down and, if kWide, two across.
  template <bool kAccumulate, bool kWide>
  static void multiply_tiles(int64_t depth, Rows<In> a, const In* b, int64_t panel_stride, float* c,
                             int64_t c_stride) {
    constexpr int64_t kRowBytes = 64;
    const int64_t a_bytes = a.row_stride * 2, c_bytes = c_stride * 4;
    float* lower = c + 16 * c_stride;
    if constexpr (kAccumulate) {
      _tile_loadd(0, c, c_bytes);
      _tile_loadd(2, lower, c_bytes);
      if constexpr (kWide) {
        _tile_loadd(1, c + 16, c_bytes);
        _tile_loadd(3, lower + 16, c_bytes);
      }
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k += 32) {
      const In* right = b + k * kPanel;
      _tile_loadd(4, a.data + k, a_bytes);
      _tile_loadd(5, a.data + k + 16 * a.row_stride, a_bytes);
      _tile_loadd(6, right, kRowBytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kWide) {
        _tile_loadd(7, right + panel_stride, kRowBytes);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(2, lower, c_bytes);
    if constexpr (kWide) {
      _tile_stored(1, c + 16, c_bytes);
      _tile_stored(3, lower + 16, c_bytes);
    }
  }
#else
  struct Session {};

  struct DotStep {
    static vec_t<float> apply(vec_t<float> left, vec_t<float> right, vec_t<float> sum) {
      return (vec_t<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
    }
  };

  // Pairs are 32-bit words to the micro-kernel: half the depth, half the strides.
  template <bool kAccumulate>
  static void multiply(int64_t rows, int64_t columns, int64_t depth, Rows<In> a, Panels<In> b,
                       float* c, int64_t c_stride) {
    MicroKernel<float, DotStep>::template multiply<kAccumulate>(
        rows, columns, depth / 2, {reinterpret_cast<const float*>(a.data), a.row_stride / 2},
        {reinterpret_cast<const float*>(b.data), b.row_stride / 2, b.panel_stride / 2}, c,
        c_stride);
  }
#endif
};

}  // namespace mor::MOR_ISA
