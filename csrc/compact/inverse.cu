// The inverse of an index: which entries name a row.
#include <algorithm>

#include "compact/rows.cuh"

namespace mor::cuda {
namespace {

// Repeats may come in any order: one of them stays.
__global__ void __launch_bounds__(kThreads) map_sources_kernel(InverseIndex inverse) {
  const int64_t entry = int64_t{block_index().x} * kThreads + thread_index();
  if (entry < inverse.count) {
    const int32_t row = inverse.index[entry];
    if (names_row(row, inverse.num_rows)) {
      inverse.first[row] = static_cast<int32_t>(entry);
    }
  }
}

// first is -1 everywhere, and so is the flag behind it. If no row is named twice, as usual, this
// gives the inverse.
__global__ void __launch_bounds__(kThreads) place_entries_kernel(InverseIndex inverse) {
  const int64_t entry = int64_t{block_index().x} * kThreads + thread_index();
  if (entry < inverse.count) {
    const int32_t row = inverse.index[entry];
    // From -1 to entry. Whoever comes later finds no -1, and leaves what order_entries corrects.
    if (names_row(row, inverse.num_rows) &&
        atomic_add(inverse.first + row, static_cast<int32_t>(entry) + 1) != -1) {
      inverse.first[inverse.num_rows] = 1;
    }
  }
}

// If a row is named twice: the lists anew, in order. Every warp has a range of rows, and puts their
// entries before each other from the last to the first.
__global__ void __launch_bounds__(kThreads) order_entries_kernel(InverseIndex inverse) {
  int32_t* first = inverse.first;
  if (!has_repeats(inverse)) {
    return;
  }
  constexpr int kWarps = kThreads / kWarpSize;
  const int64_t warps = int64_t{grid_size().x} * kWarps;
  const int64_t warp = int64_t{block_index().x} * kWarps + thread_index() / kWarpSize;
  const int64_t begin = warp * inverse.num_rows / warps,
                end = (warp + 1) * inverse.num_rows / warps;
  for (int64_t row = begin + lane_index(); row < end; row += kWarpSize) {
    first[row] = -1;
  }
  sync_warp();

  constexpr int kStep = kInFlight * kWarpSize;
  for (int64_t step = (inverse.count - 1) / kStep * kStep; step >= 0; step -= kStep) {
    int32_t rows[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int64_t entry = step + k * kWarpSize + lane_index();
      rows[k] = entry < inverse.count ? inverse.index[entry] : -1;
    }
#pragma unroll
    for (int k = kInFlight - 1; k >= 0; --k) {
      const bool own = rows[k] >= begin && rows[k] < end;
      if (!any_lane(own)) {
        continue;
      }
      const auto entry = static_cast<int32_t>(step + k * kWarpSize + lane_index());
      const uint32_t same = match_any(static_cast<uint32_t>(rows[k]));
      const uint32_t later = same & ~(kAllLanes >> (kWarpSize - 1 - lane_index()));
      if (own) {
        inverse.next[entry] =
            later != 0 ? entry - lane_index() + lowest_bit(later) : first[rows[k]];
      }
      sync_warp();
      if (own && lowest_bit(same) == lane_index()) {
        first[rows[k]] = entry;
      }
      sync_warp();
    }
  }
}

LaunchShape threads_of(int64_t count) {
  return {{static_cast<uint32_t>(ceil_div(count, kThreads)), 1, 1}, kThreads};
}

}  // namespace

cudaError_t map_sources(const InverseIndex& inverse, cudaStream_t stream) {
  return launch("map_sources", map_sources_kernel, threads_of(inverse.count), stream, inverse);
}

cudaError_t invert_index(const InverseIndex& inverse, cudaStream_t stream) {
  const auto bytes = static_cast<size_t>(inverse.num_rows + 1) * sizeof(int32_t);
  cudaError_t error = cudaMemsetAsync(inverse.first, 0xff, bytes, stream);
  if (error != cudaSuccess) {
    return error;
  }
  error = launch("place_entries", place_entries_kernel, threads_of(inverse.count), stream, inverse);
  if (error != cudaSuccess || inverse.count == 0) {
    return error;
  }
  // Mostly for nothing, so few enough to be quick then.
  const int64_t blocks = std::min<int64_t>(ceil_div(inverse.num_rows, 32), 128);
  return launch("order_entries", order_entries_kernel,
                {{static_cast<uint32_t>(blocks), 1, 1}, kThreads}, stream, inverse);
}

}  // namespace mor::cuda
