// gather_rms_norm_bwd: grad_x in one pass over its rows, grad_weight in two fixed-order steps.
#include "compact/norm.cuh"

namespace mor::cuda {
namespace {

// Pieces that a thread keeps in registers, with as many sums: a row of 16 KiB in those of a block.
constexpr int kMaxHeld = 2;
constexpr int kMaxTeam = 512;

// Sums of a thread's columns of a row, in registers.
template <int kElements>
class RegisterSums {
 public:
  __device__ void set(int k, int64_t, const float (&values)[kElements]) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      sums_[k][i] = values[i];
    }
  }
  __device__ void add(int k, int64_t, const float (&values)[kElements]) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      sums_[k][i] += values[i];
    }
  }
  __device__ void get(int k, int64_t, float (&values)[kElements]) const {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      values[i] = sums_[k][i];
    }
  }

 private:
  float sums_[kMaxHeld][kElements];
};

// The same in a row of memory: float* or Shared<float>.
template <int kElements, typename Memory>
class MemorySums {
 public:
  __device__ explicit MemorySums(Memory row) : row_(row) {}

  __device__ void set(int, int64_t offset, const float (&values)[kElements]) {
    for (int i = 0; i < kElements; ++i) {
      row_[offset + i] = values[i];
    }
  }
  __device__ void add(int, int64_t offset, const float (&values)[kElements]) {
    for (int i = 0; i < kElements; ++i) {
      row_[offset + i] += values[i];
    }
  }
  __device__ void get(int, int64_t offset, float (&values)[kElements]) const {
    for (int i = 0; i < kElements; ++i) {
      values[i] = row_[offset + i];
    }
  }

 private:
  Memory row_;
};

// Adds an entry's share to grad_weight, and hands its share of grad_x to sink(k, offset, values).
template <typename Row, typename T, int kElements, typename Sums, typename Sink>
__device__ void backward_entry(const GatherRmsNormBwdParams& p, int64_t entry, const Team& team,
                               Sums& grad_weight, Sink&& sink) {
  const int64_t size = p.row_size;
  const bool through_norm = p.grad_normed != nullptr;
  const auto row_of = [&](const void* rows, bool wanted) {
    const T* row = wanted ? static_cast<const T*>(rows) + entry * size : nullptr;
    return Row(row, team, size);
  };
  const Row rows = row_of(p.rows, through_norm);
  const Row grad_normed = row_of(p.grad_normed, through_norm);
  const Row grad_rows = row_of(p.grad_rows, p.grad_rows != nullptr);
  const float rstd = static_cast<const float*>(p.rstd)[entry];
  float along_row = 0;
  if (through_norm) {
    float dot = 0;
    Row::for_each(team, size, [&](int k, int64_t offset) {
      const auto row = rows.get(k, offset), grad = grad_normed.get(k, offset);
      float weight[kElements], shares[kElements];
      load_weight<T>(p.weight, p.weight_dtype, offset, weight);
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        shares[i] = grad[i] * row[i] * rstd;
        dot = std::fma(shares[i], weight[i], dot);
      }
      grad_weight.add(k, offset, shares);
    });
    along_row = team.sum(dot) / static_cast<float>(size) * rstd;
  }
  Row::for_each(team, size, [&](int k, int64_t offset) {
    const auto row = rows.get(k, offset), grad = grad_normed.get(k, offset);
    const auto grad_row = grad_rows.get(k, offset);
    float values[kElements];
    load_weight<T>(p.weight, p.weight_dtype, offset, values);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const float normed = through_norm ? rstd * (grad[i] * values[i] - along_row * row[i]) : 0;
      values[i] = normed + grad_row[i];
    }
    sink(k, offset, values);
  });
}

// A team takes every so many-th row of grad_x. A block leaves its share of grad_weight in scratch:
// row 0 of the block's two. Sums over the entries of a row are rarely needed, and so in memory.
template <typename T, int kElements, int kHeld>
__global__ void __launch_bounds__(kMaxTeam, 1)
    gather_rms_norm_bwd_kernel(GatherRmsNormBwdParams p, int team_size) {
  using Row = SpreadRow<T, kElements, kHeld>;
  SharedArena arena;
  const Team team(arena, team_size);
  const int teams = block_size() / team_size;
  const int64_t size = p.row_size, num_rows = p.inverse.num_rows;
  const auto clear = [&](auto& sums) {
    Row::for_each(team, size, [&](int k, int64_t offset) {
      constexpr float kZeros[kElements] = {};
      sums.set(k, offset, kZeros);
    });
  };
  float* scratch = static_cast<float*>(p.scratch) + int64_t{block_index().x} * 2 * size;
  const Shared<float> shares = arena.take<float>(kHeld > 0 ? teams * size : 0);
  auto grad_weight = [&] {
    if constexpr (kHeld > 0) {
      return RegisterSums<kElements>();
    } else {
      return MemorySums<kElements, float*>(scratch);
    }
  }();
  auto sum = [&] {
    if constexpr (kHeld > 0) {
      return MemorySums<kElements, Shared<float>>(shares + team.number() * size);
    } else {
      return MemorySums<kElements, float*>(scratch + size);
    }
  }();
  clear(grad_weight);

  const bool repeats = has_repeats(p.inverse);
  const int64_t step = int64_t{grid_size().x} * teams;
  int64_t row = int64_t{block_index().x} * teams + team.number();
  int32_t upcoming = row < num_rows ? p.inverse.first[row] : -1;
  for (; row < num_rows; row += step) {
    int32_t entry = upcoming;
    upcoming = row + step < num_rows ? p.inverse.first[row + step] : -1;
    T* out = static_cast<T*>(p.grad_x) + row * size;
    if (entry < 0) {
      Row::for_each(team, size,
                    [&](int, int64_t offset) { Piece<T, kElements>{}.store(out + offset); });
      continue;
    }
    // One entry, as usual, is stored at once; several by way of their sum.
    const bool one = !repeats || p.inverse.next[entry] < 0;
    if (!one) {
      clear(sum);
    }
    for (; entry >= 0; entry = one ? -1 : p.inverse.next[entry]) {
      backward_entry<Row, T, kElements>(p, entry, team, grad_weight,
                                        [&](int k, int64_t offset, float (&values)[kElements]) {
                                          if (one) {
                                            Piece<T, kElements>::of(values).store(out + offset);
                                          } else {
                                            sum.add(k, offset, values);
                                          }
                                        });
    }
    if (!one) {
      Row::for_each(team, size, [&](int k, int64_t offset) {
        float values[kElements];
        sum.get(k, offset, values);
        Piece<T, kElements>::of(values).store(out + offset);
      });
    }
  }

  if constexpr (kHeld > 0) {
    // The teams' shares, one after the other.
    Row::for_each(team, size, [&](int k, int64_t offset) {
      float values[kElements];
      grad_weight.get(k, offset, values);
      sum.set(k, offset, values);
    });
    sync_threads();
    for (int64_t column = thread_index(); column < size; column += block_size()) {
      float total = 0;
      for (int t = 0; t < teams; ++t) {
        const float share = shares[t * size + column];
        total += share;
      }
      scratch[column] = total;
    }
  }
}

// grad_weight from the shares of the blocks: a lane for each column, warps for parts of the blocks.
constexpr int kSumThreads = 512;

__global__ void __launch_bounds__(kSumThreads) sum_grad_weight_kernel(GatherRmsNormBwdParams p) {
  constexpr int kWarps = kSumThreads / kWarpSize;
  const Shared<float> shares = SharedArena().take<float>(kSumThreads);
  const int64_t column = int64_t{block_index().x} * kWarpSize + lane_index();
  const int warp = thread_index() / kWarpSize;
  float share = 0;
  if (column < p.row_size) {
    const auto* scratch = static_cast<const float*>(p.scratch);
#pragma unroll 8
    for (int64_t block = warp; block < p.blocks; block += kWarps) {
      share += scratch[block * 2 * p.row_size + column];
    }
  }
  shares[thread_index()] = share;
  sync_threads();
  if (warp == 0 && column < p.row_size) {
    float total = 0;
    for (int w = 0; w < kWarps; ++w) {
      const float part = shares[w * kWarpSize + lane_index()];
      total += part;
    }
    if (p.weight_dtype == DType::kFloat32) {
      static_cast<float*>(p.grad_weight)[column] = total;
    } else if (p.weight_dtype == DType::kBFloat16) {
      static_cast<bfloat16*>(p.grad_weight)[column] = from_float<bfloat16>(total);
    } else {
      static_cast<float16*>(p.grad_weight)[column] = from_float<float16>(total);
    }
  }
}

template <typename T, int kElements, int kHeld>
cudaError_t launch_teams(const GatherRmsNormBwdParams& p, int team, cudaStream_t stream) {
  LaunchShape shape = teams_shape(p.inverse.num_rows, team);
  shape.grid.x = static_cast<uint32_t>(p.blocks);
  if (kHeld > 0) {
    shape.shared_bytes += shared_bytes<float>(shape.block / team * p.row_size);
  }
  return launch("gather_rms_norm_bwd", gather_rms_norm_bwd_kernel<T, kElements, kHeld>, shape,
                stream, p, team);
}

}  // namespace

int64_t gather_rms_norm_bwd_blocks(const GatherRmsNormBwdParams& p) {
  int device = 0, multiprocessors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  return std::clamp<int64_t>(ceil_div(p.inverse.num_rows, 8), 1, int64_t{2} * multiprocessors);
}

cudaError_t gather_rms_norm_bwd(const GatherRmsNormBwdParams& p, cudaStream_t stream) {
  if (const cudaError_t error = invert_index(p.inverse, stream); error != cudaSuccess) {
    return error;
  }
  const cudaError_t error =
      dispatch_pieces(p.dtype, {p.grad_rows, p.grad_normed, p.rows, p.weight, p.grad_x},
                      {p.row_size}, [&]<typename T, int kElements>() {
                        const int64_t pieces = p.row_size / kElements;
                        if constexpr (kElements > 1) {
                          if (pieces <= kMaxHeld * kMaxTeam) {
                            const int team = smallest_team(pieces, kMaxHeld, kMaxTeam);
                            return launch_teams<T, kElements, kMaxHeld>(p, team, stream);
                          }
                        }
                        return launch_teams<T, kElements, 0>(p, kThreads, stream);
                      });
  if (error != cudaSuccess) {
    return error;
  }
  const auto blocks = static_cast<uint32_t>(ceil_div(p.row_size, kWarpSize));
  return launch("sum_grad_weight", sum_grad_weight_kernel,
                {{blocks, 1, 1}, kSumThreads, shared_bytes<float>(kSumThreads)}, stream, p);
}

}  // namespace mor::cuda
