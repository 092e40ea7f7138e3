// gather_rms_norm: a team of threads for each row.
#include "compact/norm.cuh"

namespace mor::cuda {
namespace {

// Pieces that a thread keeps in registers: a row of 16 KiB in those of a block.
constexpr int kMaxHeld = 4;

template <typename T, int kElements, int kHeld>
__global__ void __launch_bounds__(kThreads)
    gather_rms_norm_kernel(GatherRmsNormParams p, int team_size) {
  using Row = SpreadRow<T, kElements, kHeld>;
  SharedArena arena;
  const Team team(arena, team_size);
  const int64_t entry = int64_t{block_index().x} * (kThreads / team_size) + team.number();
  if (entry >= p.count) {
    return;
  }
  const int64_t size = p.row_size;
  T* rows = static_cast<T*>(p.rows) + entry * size;
  T* normed = static_cast<T*>(p.normed) + entry * size;
  auto* rstd_of_entry = static_cast<float*>(p.rstd) + entry;
  const int32_t row = p.index[entry];
  if (!names_row(row, p.num_rows)) {
    Row::for_each(team, size, [&](int, int64_t offset) {
      Piece<T, kElements>{}.store(rows + offset);
      Piece<T, kElements>{}.store(normed + offset);
    });
    if (team.thread() == 0) {
      *rstd_of_entry = 0;
    }
    return;
  }

  const Row x(static_cast<const T*>(p.x) + row * p.x_stride, team, size);
  float squares = 0;
  Row::for_each(team, size, [&](int k, int64_t offset) {
    const auto piece = x.get(k, offset);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      squares = std::fma(piece[i], piece[i], squares);
    }
    piece.store(rows + offset);
  });
  const float mean = team.sum(squares) / static_cast<float>(size);
  const float rstd = 1 / std::sqrt(mean + static_cast<float>(p.eps));
  // Stored in a second round: no store stands between the loads of the weight.
  Piece<T, kElements> results[Row::kSlots];
  Row::for_each(team, size, [&](int k, int64_t offset) {
    const auto piece = x.get(k, offset);
    float values[kElements];
    load_weight<T>(p.weight, p.weight_dtype, offset, values);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      values[i] *= piece[i] * rstd;
    }
    results[k] = Piece<T, kElements>::of(values);
    if (kHeld == 0) {
      results[k].store(normed + offset);
    }
  });
  if (kHeld > 0) {
    Row::for_each(team, size, [&](int k, int64_t offset) { results[k].store(normed + offset); });
  }
  if (team.thread() == 0) {
    *rstd_of_entry = rstd;
  }
}

template <typename T, int kElements, int kHeld>
cudaError_t launch_teams(const GatherRmsNormParams& p, int team, cudaStream_t stream) {
  return launch("gather_rms_norm", gather_rms_norm_kernel<T, kElements, kHeld>,
                teams_shape(p.count, team), stream, p, team);
}

}  // namespace

cudaError_t gather_rms_norm(const GatherRmsNormParams& p, cudaStream_t stream) {
  return dispatch_pieces(p.dtype, {p.x, p.weight, p.rows, p.normed}, {p.row_size, p.x_stride},
                         [&]<typename T, int kElements>() {
                           const int64_t pieces = p.row_size / kElements;
                           const int team = smallest_team(pieces, kMaxHeld, kThreads);
                           if constexpr (kElements > 1) {
                             if (pieces <= kMaxHeld * kThreads) {
                               return launch_teams<T, kElements, kMaxHeld>(p, team, stream);
                             }
                           }
                           return launch_teams<T, kElements, 0>(p, team, stream);
                         });
}

}  // namespace mor::cuda
