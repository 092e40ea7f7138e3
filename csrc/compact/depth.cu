// compact_depth: the lists of all depths in one pass over the tokens.
//
// A block takes a tile of tokens and kDepths depths, one for each of its warps. It counts its
// active tokens, learns from the tiles before it how many there are up to it (decoupled look-back,
// Merrill and Garland 2016), and writes its part of every list: active tokens from the list's
// start, and for each inactive one a -1 from the list's end.
#include <algorithm>

#include "common/launch.cuh"
#include "compact/launch.h"

namespace mor::cuda {
namespace {

constexpr int kDepths = 8;
constexpr int kThreads = kDepths * kWarpSize;
constexpr int kChunks = kWarpSize;  // of a tile: a warp counts them with one lane for each
constexpr int kTile = kChunks * kWarpSize;
constexpr int kChunksPerWarp = kChunks / kDepths;

// More sequences than a block looks through one by one.
constexpr int64_t kManySequences = 4 * kThreads;

// What is known of a (tile, depth): the count in the lower half, above it one of these. 0: nothing.
constexpr uint64_t kTileCount = uint64_t{1} << 32;  // of the tile
constexpr uint64_t kFullCount = uint64_t{2} << 32;  // of all tiles up to and with it

int64_t tiles_of(const CompactDepthParams& p) {
  return std::max<int64_t>(1, ceil_div(p.rows, kTile));  // at least one, to write cu_seqlens_out
}

// The scratch memory, zero at first.
struct Scratch {
  __device__ explicit Scratch(const CompactDepthParams& p)
      : ticket(static_cast<int32_t*>(p.scratch)), states(static_cast<uint64_t*>(p.scratch) + 1) {}

  int32_t* ticket;
  uint64_t* states;  // [tiles, recursions]
};

// The count of all tiles before the given one, for a whole warp. states: of the depth.
__device__ int32_t look_back(const uint64_t* states, int64_t stride, int64_t tile) {
  int32_t count = 0;
  for (int64_t nearest = tile - 1;; nearest -= kWarpSize) {
    const int64_t other = nearest - lane_index();
    uint64_t state = kFullCount;  // before the first tile
    if (other >= 0) {
      while ((state = load_acquire(states + other * stride)) == 0) {
        spin_pause();
      }
    }
    const uint32_t full = ballot(state >= kFullCount);
    const int last = full != 0 ? lowest_bit(full) : kWarpSize - 1;
    count += warp_sum(lane_index() <= last ? static_cast<int32_t>(state) : 0);
    if (full != 0) {
      return count;
    }
  }
}

// The first element of an ascending cu_seqlens that is at least `token`.
__device__ int64_t first_from(const int32_t* cu_seqlens, int64_t size, int64_t token) {
  int64_t low = 0;
  for (int64_t high = size; low < high;) {
    const int64_t middle = (low + high) / 2;
    if (cu_seqlens[middle] < token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

__global__ void __launch_bounds__(kThreads) compact_depth_kernel(CompactDepthParams p) {
  SharedArena arena;
  const Shared<int32_t> ticket = arena.take<int32_t>(1);
  // Of the chunks of a tile and one past its end, for each depth: the active tokens, as bits, and
  // how many come before the chunk.
  constexpr int kRow = kChunks + 1;
  const Shared<uint32_t> active = arena.take<uint32_t>(kDepths * kRow);
  const Shared<int32_t> before = arena.take<int32_t>(kDepths * kRow);

  // By ticket, so that the tiles to look back on are already under way.
  const Scratch scratch(p);
  if (thread_index() == 0) {
    ticket[0] = atomic_add(scratch.ticket, 1);
  }
  sync_threads();
  const int32_t number = ticket[0];
  const auto groups = static_cast<int32_t>(ceil_div(p.recursions, kDepths));
  const int64_t tile = number / groups;
  const int64_t first_depth = number % groups * kDepths;
  const int depths = static_cast<int>(std::min<int64_t>(kDepths, p.recursions - first_depth));
  const int64_t begin = tile * kTile;
  const int warp = thread_index() / kWarpSize, lane = lane_index();

  // Which tokens are active.
  int32_t token_depths[kChunksPerWarp];
#pragma unroll
  for (int k = 0; k < kChunksPerWarp; ++k) {
    const int64_t token = begin + (warp * kChunksPerWarp + k) * kWarpSize + lane;
    token_depths[k] = token < p.rows ? p.depth[token] : -1;
  }
#pragma unroll
  for (int k = 0; k < kChunksPerWarp; ++k) {
    uint32_t bits = 0;
#pragma unroll
    for (int d = 0; d < kDepths; ++d) {
      const uint32_t of_depth = ballot(token_depths[k] > first_depth + d);
      bits = lane == d ? of_depth : bits;
    }
    if (lane < kDepths) {
      active[lane * kRow + warp * kChunksPerWarp + k] = bits;
    }
  }
  sync_threads();

  // How many come before each chunk: a warp for each depth, a lane for each chunk.
  if (warp < depths) {
    const uint32_t bits = active[warp * kRow + lane];
    const int32_t count = popcount(bits);
    const int32_t up_to = warp_inclusive_scan(count);
    const int32_t total = shuffle(up_to, kWarpSize - 1);
    const uint64_t* states = scratch.states + first_depth + warp;
    uint64_t* own = scratch.states + tile * p.recursions + first_depth + warp;
    if (lane == 0 && tile > 0) {
      store_release(own, kTileCount | static_cast<uint32_t>(total));
    }
    const int32_t earlier = look_back(states, p.recursions, tile);
    if (lane == 0) {
      store_release(own, kFullCount | static_cast<uint32_t>(earlier + total));
      active[warp * kRow + kChunks] = 0u;
      before[warp * kRow + kChunks] = earlier + total;
    }
    before[warp * kRow + lane] = earlier + up_to - count;
  }
  sync_threads();

  const auto rank = [&](int d, int chunk, int bit) {
    const uint32_t bits = active[d * kRow + chunk];
    const int32_t base = before[d * kRow + chunk];
    return base + popcount(bits & ((1u << bit) - 1));
  };

  // The lists.
#pragma unroll
  for (int k = 0; k < kChunksPerWarp; ++k) {
    const int chunk = warp * kChunksPerWarp + k;
    const int64_t token = begin + chunk * kWarpSize + lane;
    for (int d = 0; token < p.rows && d < depths; ++d) {
      const int64_t active_before = rank(d, chunk, lane);
      const bool is_active = token_depths[k] > first_depth + d;
      const int64_t to = is_active ? active_before : p.rows - 1 - (token - active_before);
      p.index[(first_depth + d) * p.rows + to] = is_active ? static_cast<int32_t>(token) : -1;
    }
  }

  // The sequences that start in this tile; the last tile also has the end of all.
  const int64_t end = begin + kTile < p.rows ? begin + kTile : p.rows + 1;
  const int64_t size = p.batch + 1;
  int64_t b = size > kManySequences ? first_from(p.cu_seqlens, size, begin) : 0;
  for (b += thread_index(); b < size; b += kThreads) {
    const int64_t start = p.cu_seqlens[b];
    if (start >= end) {
      break;
    }
    for (int d = 0; start >= begin && d < depths; ++d) {
      const auto at = static_cast<int>(start - begin);
      p.cu_seqlens_out[(first_depth + d) * size + b] = rank(d, at / kWarpSize, at % kWarpSize);
    }
  }
}

}  // namespace

int64_t compact_depth_scratch_bytes(const CompactDepthParams& p) {
  return static_cast<int64_t>(sizeof(uint64_t)) * (1 + tiles_of(p) * p.recursions);
}

cudaError_t compact_depth(const CompactDepthParams& p, cudaStream_t stream) {
  const auto bytes = static_cast<size_t>(compact_depth_scratch_bytes(p));
  if (const cudaError_t error = cudaMemsetAsync(p.scratch, 0, bytes, stream);
      error != cudaSuccess) {
    return error;
  }
  const int64_t blocks = tiles_of(p) * ceil_div(p.recursions, kDepths);
  constexpr int64_t kShared =
      shared_bytes<int32_t>(1) + 2 * shared_bytes<int32_t>(kDepths * (kChunks + 1));
  return launch("compact_depth", compact_depth_kernel,
                {{static_cast<uint32_t>(blocks), 1, 1}, kThreads, kShared}, stream, p);
}

}  // namespace mor::cuda
