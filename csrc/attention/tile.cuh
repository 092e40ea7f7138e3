// Tiles of rows in shared memory, and products of tiles on tensor cores: what every attention
// kernel is made of.
//
// All dtypes share one code: a 16-byte chunk of a row is a row of an ldmatrix matrix, and a step of
// a product takes two chunks, 16 elements of 16 bit or 8 of fp32. fp32 products are made of three
// tf32 ones ("3xTF32", Ootomo and Yokota, arXiv 2203.03341), which keeps 22 of fp32's 24 bits.
#pragma once

#include "common/launch.cuh"

namespace mor::cuda {

// Calls f.template operator()<kDim>() with the smallest padded head_dim that there are kernels for.
template <typename F>
cudaError_t dispatch_head_dim(int64_t head_dim, F&& f) {
  if (head_dim <= 64) {
    return f.template operator()<64>();
  }
  return head_dim <= 128 ? f.template operator()<128>() : f.template operator()<256>();
}

// kRows rows of kDim elements, chunks swizzled: the eight rows that one ldmatrix matrix reads, at
// the same chunk, lie in different banks.
template <typename T, int kRows_, int kDim_>
struct Tile {
  static constexpr int kRows = kRows_, kDim = kDim_;
  static constexpr int kChunks = kDim * static_cast<int>(sizeof(T)) / 16;  // of a row
  static constexpr int64_t kBytes = shared_bytes<T, 128>(int64_t{kRows} * kDim);
  static_assert(kChunks % 8 == 0);

  __device__ static Tile take(SharedArena& arena) {
    return {arena.take<T, 128>(int64_t{kRows} * kDim)};
  }

  // Where a chunk begins, in elements from the tile's start.
  __device__ static int offset(int row, int chunk) {
    return row * kDim + (chunk ^ (static_cast<uint32_t>(row) % 8)) * kVector16<T>;
  }

  // The offset of the chunk `chunks` further, from that of a chunk below 8 whose bits do not
  // overlap with it: a few bits flip, the rest is added, so that next to nothing is kept for every
  // step.
  __device__ static int further(int offset, int chunks) {
    return (offset ^ (chunks % 8 * kVector16<T>)) + chunks / 8 * 8 * kVector16<T>;
  }

  __device__ Shared<T> chunk(int row, int chunk) const { return data + offset(row, chunk); }

  __device__ T at(int row, int column) const {
    const T value = chunk(row, column / kVector16<T>)[column % kVector16<T>];
    return value;
  }

  Shared<T> data;
};

// Starts copies into rows [first, first + kCount) of a tile, by kThreads threads: row(i) is a
// pointer to the head_dim elements of row first + i, 16-byte aligned, or null; from `rows` on, past
// head_dim, and where it is null, zeros.
template <int kCount, int kThreads, typename T, int kRows, int kDim, typename Row>
__device__ void load_tile(const Tile<T, kRows, kDim>& tile, int first, int rows, int head_dim,
                          Row&& row) {
  constexpr int kChunks = Tile<T, kRows, kDim>::kChunks, kRowsAtOnce = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kCount % kRowsAtOnce == 0);
  const int chunk = thread_index() % kChunks;
  const bool inside = chunk * kVector16<T> < head_dim;
#pragma unroll 4
  for (int i = 0; i < kCount / kRowsAtOnce; ++i) {
    const int r = thread_index() / kChunks + i * kRowsAtOnce;
    const T* from = inside && r < rows ? row(r) : nullptr;
    const bool valid = from != nullptr;
    copy_async(tile.chunk(first + r, chunk), valid ? from + chunk * kVector16<T> : from, valid);
  }
}

// ---- operands of one mma ----

// kCount registers of a fragment, ready to be multiplied.
template <typename T, int kCount>
struct Operand {
  uint32_t value[kCount];

  __device__ void set(int i, uint32_t bits) { value[i] = bits; }
};

// fp32 as the sum of two tf32.
template <int kCount>
struct Operand<float, kCount> {
  uint32_t high[kCount], low[kCount];

  __device__ void set(int i, uint32_t bits) {
    const float x = std::bit_cast<float>(bits);
    high[i] = to_tf32(x);
    low[i] = to_tf32(x - std::bit_cast<float>(high[i]));
  }
};

template <typename T>
using OperandA = Operand<T, 4>;
template <typename T>
using OperandB = Operand<T, 2>;

// c += a b.
template <typename T>
__device__ void multiply_add(float (&c)[4], const OperandA<T>& a, const OperandB<T>& b) {
  if constexpr (std::is_same_v<T, float>) {
    mma_16x8x8_tf32(c, a.low, b.high);
    mma_16x8x8_tf32(c, a.high, b.low);
    mma_16x8x8_tf32(c, a.high, b.high);
  } else {
    mma_16x8x16<T>(c, a.value, b.value);
  }
}

// Tensor cores round their sums towards zero, which would cost a long sum in fp32 its last bits:
// there they sum up a few steps, and this adds the rest, rounding to nearest.
__device__ inline void add(float (&c)[4], const float (&product)[4]) {
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    c[e] += product[e];
  }
}

// Fragments are read at an offset of the lane's own, which holds for all steps and for all rows
// that are a multiple of 8 further.

// As A: rows [row, row + 16).
template <typename T, int kRows, int kDim>
__device__ int a_offset(const Tile<T, kRows, kDim>& tile, int row) {
  return row * kDim + tile.offset(lane_index() % 16, lane_index() / 16);
}

template <typename T, int kRows, int kDim>
__device__ OperandA<T> load_a(const Tile<T, kRows, kDim>& tile, int offset, int rows, int step) {
  uint32_t fragment[4];
  load_matrix_x4(fragment, tile.data + (tile.further(offset, 2 * step) + rows * kDim));
  OperandA<T> a;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    a.set(i, fragment[i]);
  }
  return a;
}

// As the columns of two Bs: rows [row, row + 16).
template <typename T, int kRows, int kDim>
__device__ int b_offset(const Tile<T, kRows, kDim>& tile, int row) {
  const int lane = lane_index();
  return row * kDim + tile.offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
}

template <typename T, int kRows, int kDim>
__device__ void load_b(const Tile<T, kRows, kDim>& tile, int offset, int rows, int step,
                       OperandB<T> (&b)[2]) {
  uint32_t fragment[4];
  load_matrix_x4(fragment, tile.data + (tile.further(offset, 2 * step) + rows * kDim));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    b[i / 2].set(i % 2, fragment[i]);
  }
}

// ---- products; accumulators are c[row tile of 16][column tile of 8][register] ----

// How many accumulator columns one step of a product over them takes.
template <typename T>
inline constexpr int kStepColumns = 32 / static_cast<int>(sizeof(T));

// c = a[rows] . b[rows]: row i, column j is the dot product of row a_row + i of a and row b_row + j
// of b. In fp32 a result that is NaN is computed anew without tensor cores: where a score is
// infinite, the parts of 3xTF32 give NaN.
template <typename T, int kRowTiles, int kColumnTiles, int kRowsA, int kRowsB, int kDim>
__device__ void multiply_rows(float (&c)[kRowTiles][kColumnTiles][4],
                              const Tile<T, kRowsA, kDim>& a, int a_row,
                              const Tile<T, kRowsB, kDim>& b, int b_row) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        c[i][j][e] = 0;
      }
    }
  }
  constexpr int kSteps = Tile<T, kRowsA, kDim>::kChunks / 2;
  // Not all: fragments would be read so far ahead that registers spill.
  [[maybe_unused]] constexpr int kUnroll = std::is_same_v<T, float> ? 2 : 4;
  const int offset_a = a_offset(a, a_row), offset_b = b_offset(b, b_row);
#pragma unroll(kUnroll)
  for (int step = 0; step < kSteps; ++step) {
    OperandA<T> operand_a[kRowTiles];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      operand_a[i] = load_a(a, offset_a, 16 * i, step);
    }
#pragma unroll
    for (int j = 0; j < kColumnTiles; j += 2) {
      OperandB<T> operand_b[2];
      load_b(b, offset_b, 8 * j, step, operand_b);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          if constexpr (std::is_same_v<T, float>) {
            float product[4] = {};
            multiply_add<T>(product, operand_a[i], operand_b[k]);
            add(c[i][j + k], product);
          } else {
            multiply_add<T>(c[i][j + k], operand_a[i], operand_b[k]);
          }
        }
      }
    }
  }
  if constexpr (std::is_same_v<T, float>) {
    redo_nan(c, a, a_row, b, b_row);
  }
}

// The row and column, in a warp's accumulators, of element e of tile (i, j).
__device__ inline int accumulator_row(int i, int e) {
  return 16 * i + lane_index() / 4 + e / 2 * 8;
}
__device__ inline int accumulator_column(int j, int e) {
  return 8 * j + lane_index() % 4 * 2 + e % 2;
}

template <int kRowTiles, int kColumnTiles, int kRowsA, int kRowsB, int kDim>
__device__ void redo_nan(float (&c)[kRowTiles][kColumnTiles][4], const Tile<float, kRowsA, kDim>& a,
                         int a_row, const Tile<float, kRowsB, kDim>& b, int b_row) {
  float all = 0;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
      all += (c[i][j][0] + c[i][j][1]) + (c[i][j][2] + c[i][j][3]);
    }
  }
  if (!any_lane(all - all != 0)) {  // all are finite
    return;
  }
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (c[i][j][e] != c[i][j][e]) {
          float sum = 0;
#pragma unroll 1
          for (int d = 0; d < kDim; ++d) {
            sum +=
                a.at(a_row + accumulator_row(i, e), d) * b.at(b_row + accumulator_column(j, e), d);
          }
          c[i][j][e] = sum;
        }
      }
    }
  }
}

// Columns [8 j, 8 j + kStepColumns) of accumulators, as A. tf32 fragments want columns t and t + 4
// where accumulators hold 2t and 2t + 1; load_b_transposed takes the rows of B in the same order.
template <typename T, int kColumnTiles>
__device__ OperandA<T> accumulators_as_a(const float (&c)[kColumnTiles][4], int j) {
  OperandA<T> a;
  if constexpr (std::is_same_v<T, float>) {
    a.set(0, std::bit_cast<uint32_t>(c[j][0]));
    a.set(1, std::bit_cast<uint32_t>(c[j][2]));
    a.set(2, std::bit_cast<uint32_t>(c[j][1]));
    a.set(3, std::bit_cast<uint32_t>(c[j][3]));
  } else {
    a.set(0, pack<T>(c[j][0], c[j][1]));
    a.set(1, pack<T>(c[j][2], c[j][3]));
    a.set(2, pack<T>(c[j + 1][0], c[j + 1][1]));
    a.set(3, pack<T>(c[j + 1][2], c[j + 1][3]));
  }
  return a;
}

// As the rows of two Bs: rows [row, row + kStepColumns), columns [16 pair, 16 pair + 16). For tf32
// the lane reads single elements, of a row that load_b_transposed finds from the offset's row.
template <typename T, int kRows, int kDim>
__device__ int b_transposed_offset(const Tile<T, kRows, kDim>& tile, int row) {
  const int lane = lane_index();
  return row * kDim +
         (std::is_same_v<T, float> ? tile.offset(lane % 4 * 2, lane / 16) + lane / 4 % 4
                                   : tile.offset(lane % 16, lane / 16));
}

template <typename T, int kRows, int kDim>
__device__ void load_b_transposed(const Tile<T, kRows, kDim>& tile, int offset, int rows, int pair,
                                  OperandB<T> (&b)[2]) {
  if constexpr (std::is_same_v<T, float>) {
    // Row 2t + i % 2, whose swizzle differs in the lowest bit, column 16 pair + 8 (i / 2) + g.
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = tile.further(offset, (4 * pair + i / 2 * 2) ^ (i % 2));
      const float x = tile.data[at + (rows + i % 2) * kDim];
      b[i / 2].set(i % 2, std::bit_cast<uint32_t>(x));
    }
  } else {
    uint32_t fragment[4];
    load_matrix_x4_transposed(fragment, tile.data + (tile.further(offset, 2 * pair) + rows * kDim));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      b[i / 2].set(i % 2, fragment[i]);
    }
  }
}

// c += p b: p are accumulators of a product, rounded to T; their column j goes with row b_row + j
// of b. Column tile j of c is columns [8 j, 8 j + 8) of b.
template <typename T, int kRowTiles, int kColumnTiles, int kRows, int kDim>
__device__ void multiply_accumulators(float (&c)[kRowTiles][kDim / 8][4],
                                      const float (&p)[kRowTiles][kColumnTiles][4],
                                      const Tile<T, kRows, kDim>& b, int b_row) {
  const int offset = b_transposed_offset(b, b_row);
#pragma unroll
  for (int column = 0; column < 8 * kColumnTiles; column += kStepColumns<T>) {
    OperandA<T> operand_a[kRowTiles];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      operand_a[i] = accumulators_as_a<T>(p[i], column / 8);
    }
#pragma unroll
    for (int pair = 0; pair < kDim / 16; ++pair) {
      OperandB<T> operand_b[2];
      load_b_transposed(b, offset, column, pair, operand_b);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        multiply_add<T>(c[i][2 * pair], operand_a[i], operand_b[0]);
        multiply_add<T>(c[i][2 * pair + 1], operand_a[i], operand_b[1]);
      }
    }
  }
}

template <int kRowTiles, int kColumnTiles, int kRows, int kDim>
__device__ void multiply_accumulators(float (&c)[kRowTiles][kDim / 8][4],
                                      const float (&p)[kRowTiles][kColumnTiles][4],
                                      const Tile<float, kRows, kDim>& b, int b_row) {
  const int offset = b_transposed_offset(b, b_row);
#pragma unroll
  for (int pair = 0; pair < kDim / 16; ++pair) {
    float product[kRowTiles][2][4] = {};
#pragma unroll
    for (int column = 0; column < 8 * kColumnTiles; column += kStepColumns<float>) {
      OperandB<float> operand_b[2];
      load_b_transposed(b, offset, column, pair, operand_b);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        const OperandA<float> operand_a = accumulators_as_a<float>(p[i], column / 8);
        multiply_add<float>(product[i][0], operand_a, operand_b[0]);
        multiply_add<float>(product[i][1], operand_a, operand_b[1]);
      }
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      add(c[i][2 * pair], product[i][0]);
      add(c[i][2 * pair + 1], product[i][1]);
    }
  }
}

// ---- results ----

// A warp's accumulators, times factor(i, half) for the row 16 i + 8 half + lane / 4, into rows
// [row, ...) of a tile that no other warp uses.
template <typename T, int kRowTiles, int kRows, int kDim, typename Factor>
__device__ void stage_rows(const Tile<T, kRows, kDim>& tile, int row,
                           const float (&c)[kRowTiles][kDim / 8][4], Factor&& factor) {
  sync_warp();
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + accumulator_row(i, 2 * half);
      const float scale = factor(i, half);
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j) {
        const int column = accumulator_column(j, 0);
        const Vector<T, 2> pair{from_float<T>(c[i][j][2 * half] * scale),
                                from_float<T>(c[i][j][2 * half + 1] * scale)};
        const Shared<T> to = tile.chunk(r, column / kVector16<T>) + column % kVector16<T>;
        to.template as<Vector<T, 2>>()[0] = pair;
      }
    }
  }
  sync_warp();
}

// Writes rows [row, row + count) of a tile, which stage_rows of the same warp wrote, to memory;
// target(i) is where row `row + i` goes, or null.
template <typename T, int kRows, int kDim, typename Target>
__device__ void store_rows(const Tile<T, kRows, kDim>& tile, int row, int count, int head_dim,
                           Target&& target) {
  using TileType = Tile<T, kRows, kDim>;
  for (int i = lane_index(); i < count * TileType::kChunks; i += kWarpSize) {
    const int r = i / TileType::kChunks, chunk = i % TileType::kChunks;
    T* to = chunk * kVector16<T> < head_dim ? target(r) : nullptr;
    if (to != nullptr) {
      using Chunk = Vector<T, kVector16<T>>;
      const Chunk value = tile.chunk(row + r, chunk).template as<Chunk>()[0];
      *reinterpret_cast<Chunk*>(to + chunk * kVector16<T>) = value;
    }
  }
}

}  // namespace mor::cuda
