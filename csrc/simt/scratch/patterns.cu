// Patterns that real kernels use, and each with a mistake that one makes. Where a mistake is found
// `// fails: NAME` stands.
#include "simt/scratch/scratch.h"

namespace mor {
namespace {

enum class Mistake {
  kNone,
  kNoBarrier,
  kNoWait,
  kTooSoon,
  kOnePast,
};
using enum Mistake;

// ---- tiles through two buffers, one barrier a tile ----

constexpr int kTiles = 8, kTile = 64;  // words

// data[t] = sum over tiles of (tile + 1) * the tile's word 63 - t.
template <Mistake kMistake>
__global__ void pipeline(int32_t* data) {
  const Shared<int32_t> s = SharedArena().take<int32_t>(2 * kTile);
  const int t = thread_index();
  const auto start = [&](int tile) {
    if (tile < kTiles && t < kTile / 4) {
      const int to = tile % 2 * kTile + 4 * t + (kMistake == kOnePast ? 4 : 0);
      const int32_t* from = data + tile * kTile + 4 * t;
      copy_async(s + to, from);  // fails: pipeline_too_soon, pipeline_no_barrier, pipeline_one_past
    }
    copy_async_commit();
  };
  int32_t sum = 0;
  start(0);
  for (int tile = 0; tile < kTiles; ++tile) {
    if constexpr (kMistake == kTooSoon) {
      start(tile + 1);
      copy_async_wait<1>();
      sync_threads();
    } else {
      copy_async_wait<kMistake == kNoWait ? 1 : 0>();
      if (kMistake != kNoBarrier) {
        sync_threads();
      }
      start(tile + 1);
    }
    const int32_t word = s[tile % 2 * kTile + kTile - 1 - t];  // fails: pipeline_no_wait
    sum += (tile + 1) * word;
  }
  sync_threads();
  data[t] = sum;
}

// ---- a producing warp, two consuming warps, named barriers for "full" and "empty" ----

constexpr int kRounds = 6;

// data[t] = sum over rounds of (round + 1) * the round's word 31 - t; in: data[64...].
template <Mistake kMistake>
__global__ void producer_consumer(int32_t* data) {
  const Shared<int32_t> s = SharedArena().take<int32_t>(2 * 32);
  const int lane = lane_index();
  const auto full = [](int round) { return 1 + round % 2; };
  const auto empty = [](int round) { return 3 + round % 2; };
  if (thread_index() < 32) {
    for (int round = 0; round < kRounds; ++round) {
      if (round >= 2 && kMistake != kNoWait) {
        sync_named(empty(round), 96);
      }
      if (kMistake == kTooSoon) {
        arrive_named(full(round), 96);
      }
      s[round % 2 * 32 + lane] = data[64 + round * 32 + lane];
      if (kMistake != kTooSoon) {
        arrive_named(full(round), 96);  // fails: consumer_not_waited_for
      }
    }
  } else {
    int32_t sum = 0;
    for (int round = 0; round < kRounds; ++round) {
      sync_named(full(round), 96);
      const int32_t word = s[round % 2 * 32 + 31 - lane];  // fails: producer_too_soon
      sum += (round + 1) * word;
      if (round + 2 < kRounds && kMistake != kNoWait) {
        arrive_named(empty(round), 96);
      }
    }
    data[thread_index() - 32] = sum;
  }
}

// ---- two sums over the block through the same shared memory ----

template <Mistake kMistake>
__device__ int32_t block_sum(int32_t value, Shared<int32_t> parts) {
  value = warp_sum(value);
  if (lane_index() == 0) {
    parts[thread_index() / 32] = value;  // fails: sums_no_barrier
  }
  sync_threads();
  const int warps = block_size() / 32 + (kMistake == kOnePast ? 1 : 0);
  int32_t sum = 0;
  for (int w = 0; w < warps; ++w) {
    sum += parts[w];  // fails: sums_one_past
  }
  if (kMistake != kNoBarrier) {
    sync_threads();
  }
  return sum;
}

template <Mistake kMistake>
__global__ void sums(int32_t* data) {
  const Shared<int32_t> parts = SharedArena().take<int32_t>(4);
  const int32_t value = data[thread_index()];
  const int32_t sum = block_sum<kMistake>(value, parts);
  data[thread_index()] = block_sum<kMistake>(value * value, parts) - sum;
}

// ---- from warp to warp: 0 -> 1 -> 2, so that 2 comes after 0 without a barrier of both ----

template <Mistake kMistake>
__global__ void relay(int32_t* data) {
  const Shared<int32_t> s = SharedArena().take<int32_t>(32);
  const int warp = thread_index() / 32;
  if (warp == 0) {
    s[lane_index()] = 3 * lane_index();
    arrive_named(1, 64);
  } else if (warp == 1) {
    sync_named(1, 64);
    arrive_named(2, 64);
  } else {
    if (kMistake != kNoBarrier) {
      sync_named(2, 64);
    }
    data[lane_index()] = s[31 - lane_index()];  // fails: relay_no_barrier
  }
}

// ---- one warp writes what three read ----

// The mistake: it waits for two of them.
template <Mistake kMistake>
__global__ void three_readers(int32_t* data) {
  const Shared<int32_t> s = SharedArena().take<int32_t>(32);
  const int warp = thread_index() / 32, waited_for = kMistake == kNoBarrier ? 2 : 3;
  if (warp == 3) {
    s[lane_index()] = lane_index();
  }
  sync_threads();
  if (warp < 3) {
    data[thread_index()] = s[lane_index()];
  }
  if (warp == 3) {
    sync_named(1, 32 * (waited_for + 1));
    s[lane_index()] = 0;  // fails: three_readers_two_waited_for
  } else if (kMistake == kNone || warp != 1) {
    arrive_named(1, 32 * (waited_for + 1));
  }
}

// ---- inclusive scan over blocks: each waits for the one before ----

// Blocks take numbers as they start: one waits only for others that have started. The mistake: they
// go by block_index(). data[0]: tickets, data[64 + i]: 1 + the sum up to block i; in: data[128...].
template <Mistake kMistake>
__global__ void look_back(int32_t* data) {
  int32_t block = thread_index() == 0 ? atomic_add(data, 1) : 0;
  block = kMistake == kTooSoon ? static_cast<int32_t>(block_index().x) : shuffle(block, 0);
  int32_t* sums = data + 64;
  const int32_t own = warp_sum(data[128 + block * 32 + lane_index()]);
  int32_t before = 1;
  while (block > 0 && any_lane((before = load_acquire(sums + block - 1)) == 0)) {
    spin_pause();
  }
  if (lane_index() == 0) {
    store_release(sums + block, before + own);
  }
}

}  // namespace

ScratchKernels pattern_kernels() {
  const auto tiles = [](auto kernel) { return Scratch{kernel, 64, 2 * 4 * kTile}; };
  const auto warps = [](auto kernel) { return Scratch{kernel, 96, 256}; };
  const auto four_warps = [](auto kernel) { return Scratch{kernel, 128, 256, {1, 1, 1}, 128}; };
  const auto blocks = [](auto kernel) { return Scratch{kernel, 32, 0, {9, 1, 1}, 73}; };
  return {
      {"pipeline", tiles(pipeline<kNone>)},
      {"pipeline_no_barrier", tiles(pipeline<kNoBarrier>)},
      {"pipeline_no_wait", tiles(pipeline<kNoWait>)},
      {"pipeline_too_soon", tiles(pipeline<kTooSoon>)},
      {"pipeline_one_past", tiles(pipeline<kOnePast>)},
      {"producer_consumer", warps(producer_consumer<kNone>)},
      {"producer_too_soon", warps(producer_consumer<kTooSoon>)},
      {"consumer_not_waited_for", warps(producer_consumer<kNoWait>)},
      {"sums", four_warps(sums<kNone>)},
      {"sums_no_barrier", four_warps(sums<kNoBarrier>)},
      {"sums_one_past", four_warps(sums<kOnePast>)},
      {"relay", warps(relay<kNone>)},
      {"relay_no_barrier", warps(relay<kNoBarrier>)},
      {"three_readers", four_warps(three_readers<kNone>)},
      {"three_readers_two_waited_for", four_warps(three_readers<kNoBarrier>)},
      {"look_back", blocks(look_back<kNone>)},
      {"look_back_by_block_index", blocks(look_back<kTooSoon>)},
  };
}

}  // namespace mor
