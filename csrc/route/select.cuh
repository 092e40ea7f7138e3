// Picking the highest keys of a sequence: what one block does with keys that it holds in registers.
//
// Radix select: a histogram of the keys' highest digit says in which bucket the last of the wanted
// keys lies; then a histogram of the next digit of that bucket's keys, and so on until all keys of
// a bucket are wanted or all its keys are equal. Keys above the bucket are selected, and of those
// in it the first ones by row. One scan over the numbers of both gives every row its place.
#pragma once

#include "common/launch.cuh"
#include "route/keys.cuh"
#include "route/params.h"

namespace mor {

// ---- what to do ----

// One sequence of the batch, with everything clamped to the tensors, whose sizes are below 2^31.
struct Sequence {
  int32_t begin, length;  // rows
  int32_t out, room;      // its places in index
  int32_t count;          // of rows to select; less than room only if cu_seqlens_out is wrong
};

// The first sequence's places start at 0 and the last one's end at total_out, so that all sequences
// together cover index whatever is in cu_seqlens_out.
MOR_PRIMITIVE Sequence sequence_of(const RouteTopkParams& p, int64_t b) {
  const auto clamp = [](int32_t x, int32_t low, int32_t high) {
    return std::max(low, std::min(x, high));
  };
  const auto rows = static_cast<int32_t>(p.rows), total_out = static_cast<int32_t>(p.total_out);
  const int32_t begin = p.cu_seqlens[b], end = p.cu_seqlens[b + 1];
  const int32_t out = p.cu_seqlens_out[b], out_end = p.cu_seqlens_out[b + 1];
  Sequence s;
  s.begin = clamp(begin, 0, rows);
  s.length = std::min(clamp(end, s.begin, rows) - s.begin, static_cast<int32_t>(p.max_seqlen));
  s.out = b == 0 ? 0 : clamp(out, 0, total_out);
  s.room = (b == p.batch - 1 ? total_out : clamp(out_end, s.out, total_out)) - s.out;
  s.count = std::min(s.room, s.length);
  return s;
}

// The keys in [low, high], of which `wanted` are to be selected, and all keys above.
struct Bucket {
  uint32_t low, high;
  int32_t wanted;
  int32_t settled;  // nothing is to be found out: all or none are wanted

  MOR_PRIMITIVE bool contains(uint32_t key) const { return key - low <= high - low; }
};

MOR_PRIMITIVE Bucket whole_bucket(const Sequence& s) {
  return {1, kLargestKey, s.count, s.count == 0 || s.count == s.length};
}

// ---- a block's keys ----

// The block's shared memory.
struct Workspace {
  Shared<int32_t> histogram;  // [kBins]
  Shared<uint32_t> warps;     // [32], a number from each warp
  Shared<Bucket> bucket;      // [1]

  MOR_PRIMITIVE explicit Workspace(SharedArena& arena)
      : histogram(arena.take<int32_t>(kBins)),
        warps(arena.take<uint32_t>(kWarpSize)),
        bucket(arena.take<Bucket>(1)) {}
  static constexpr int64_t bytes() {
    return shared_bytes<int32_t>(kBins) + shared_bytes<uint32_t>(kWarpSize) +
           shared_bytes<Bucket>(1);
  }
};

// The row of a thread's i-th key, from the block's first one: rows ascend with the warp, then i,
// then the lane, so that loads are contiguous, and so are a warp's results.
template <int kItems>
__device__ int32_t row_of(int i) {
  return (thread_index() / kWarpSize * kItems + i) * kWarpSize + lane_index();
}

// The keys of the block's rows, which begin at `first`; 0 for those outside [begin, end), which is
// not empty.
template <typename T, int kItems>
__device__ void load_keys(uint32_t (&keys)[kItems], const RouteTopkParams& p, int64_t first,
                          int64_t begin, int64_t end) {
  const T* from = static_cast<const T*>(p.scores) + first;
  const auto low = static_cast<int32_t>(begin - first),
             last = static_cast<int32_t>(end - first) - 1;
  const int32_t first_of_warp = row_of<kItems>(0) - lane_index();
  T scores[kItems];  // all loads first, so that they are under way together
  if (low <= first_of_warp && first_of_warp + kItems * kWarpSize - 1 <= last) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      scores[i] = from[row_of<kItems>(i)];
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      keys[i] = key_of(to_float(scores[i]));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {  // another row instead of a predicate: those are few
      scores[i] = from[std::max(low, std::min(row_of<kItems>(i), last))];
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const bool inside = low <= row_of<kItems>(i) && row_of<kItems>(i) <= last;
      keys[i] = inside ? key_of(to_float(scores[i])) : 0;
    }
  }
}

template <int kThreads>
__device__ void clear_histogram(const Workspace& shared) {
#pragma unroll
  for (int i = 0; i < kBins / kThreads; ++i) {
    shared.histogram[i * kThreads + thread_index()] = 0;
  }
}

// Adds up a digit of the bucket's keys. The addend 1 lets the hardware count equal bins of a warp
// at once.
template <int kItems>
__device__ void count_digits(const uint32_t (&keys)[kItems], const Bucket& bucket, int shift,
                             const Workspace& shared) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (bucket.contains(keys[i])) {
      atomic_add(shared.histogram + (keys[i] >> shift) % kBins, 1);
    }
  }
}

// The part of the bucket in which its last wanted key lies. take(bin): how many of its keys have
// that digit; asked once for each bin.
template <int kThreads, typename Take>
__device__ Bucket narrow(const Bucket& bucket, int shift, const Workspace& shared, Take&& take) {
  constexpr int kPerLane = kBins / kThreads;
  const int warp = thread_index() / kWarpSize;
  const auto bin_of = [&](int i) {  // from the highest to the lowest
    return kBins - 1 - ((warp * kPerLane + i) * kWarpSize + lane_index());
  };
  int32_t counts[kPerLane];
  int32_t own = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    counts[i] = take(bin_of(i));
    own += counts[i];
  }
  own = warp_sum(own);
  if (lane_index() == 0) {
    shared.warps[warp] = static_cast<uint32_t>(own);
  }
  if (thread_index() == 0) {
    shared.bucket[0] = bucket;  // stays only if the histogram is not of this bucket
  }
  sync_threads();

  int32_t above = 0;  // the number of keys in higher bins
  if (lane_index() < warp) {
    const uint32_t other = shared.warps[lane_index()];
    above = static_cast<int32_t>(other);
  }
  above = warp_sum(above);
  if (above < bucket.wanted && bucket.wanted <= above + own) {  // so in one warp
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int32_t through = above + warp_inclusive_scan(counts[i]);
      const int32_t wanted = bucket.wanted - (through - counts[i]);
      if (0 < wanted && wanted <= counts[i]) {
        const uint32_t prefix = (bucket.high >> shift) / kBins * kBins + bin_of(i);
        const uint32_t low = prefix << shift;
        shared.bucket[0] = {low, low + ((1u << shift) - 1), wanted, counts[i] == wanted};
      }
      above = shuffle(through, kWarpSize - 1);
    }
  }
  sync_threads();
  return shared.bucket[0];
}

// ---- places ----

// Numbers of keys above a bucket and in it.
struct Tally {
  int32_t greater, equal;
};

struct Tallies {
  Tally before, own;  // of the block's earlier warps, of this warp
  Tally block;
};

template <int kThreads, int kItems>
__device__ Tallies tally(const uint32_t (&keys)[kItems], const Bucket& bucket,
                         const Workspace& shared) {
  static_assert(kThreads * kItems < 1 << 16, "two counts in 32 bits");
  const int warp = thread_index() / kWarpSize;
  uint32_t own = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    own += keys[i] > bucket.high ? 1u : keys[i] >= bucket.low ? 1u << 16 : 0u;
  }
  own = warp_sum(own);
  if (lane_index() == 0) {
    shared.warps[warp] = own;
  }
  sync_threads();
  uint32_t through = 0;
  if (lane_index() < kThreads / kWarpSize) {
    through = shared.warps[lane_index()];
  }
  through = warp_inclusive_scan(through);
  const uint32_t before = shuffle(through, warp) - own;
  const uint32_t block = shuffle(through, kWarpSize - 1);
  const auto unpack = [](uint32_t packed) {
    return Tally{static_cast<int32_t>(packed & 0xffff), static_cast<int32_t>(packed >> 16)};
  };
  return {unpack(before), unpack(own), unpack(block)};
}

// Writes the warp's selected rows to their places among the sequence's. before: the tally of all of
// the sequence's rows before the warp's.
template <int kItems>
__device__ void emit(uint32_t (&keys)[kItems], const Bucket& bucket, const Tally& before,
                     const Tally& own, const RouteTopkParams& p, const Sequence& s, int64_t first) {
  const uint32_t lower_lanes = (1u << lane_index()) - 1;
  const int32_t ties = bucket.wanted - before.equal;  // that are left for this warp
  if (0 < ties && ties < own.equal) {                 // so in one warp: drops its last ones
    int32_t equal_before = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const bool equal = bucket.contains(keys[i]);
      const uint32_t lanes = ballot(equal);
      if (equal && equal_before + popcount(lanes & lower_lanes) >= ties) {
        keys[i] = 0;
      }
      equal_before += popcount(lanes);
    }
  }
  int32_t place = before.greater + std::min(before.equal, bucket.wanted);
  const int64_t end = int64_t{place} + own.greater + std::max(std::min(ties, own.equal), 0);
  if (place < 0 || end > s.count) {
    return;  // only where cu_seqlens are wrong
  }
  int32_t* index = p.index + s.out;
  const uint32_t floor = ties > 0 ? bucket.low - 1 : bucket.high;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const bool selected = keys[i] > floor;
    const uint32_t lanes = ballot(selected);
    if (selected) {
      index[place + popcount(lanes & lower_lanes)] =
          static_cast<int32_t>(first) + row_of<kItems>(i);
    }
    place += popcount(lanes);
  }
}

// ---- a whole sequence by one block ----

template <typename T, int kThreads, int kItems>
__device__ void select_rows(const RouteTopkParams& p, const Sequence& s, const Workspace& shared) {
#pragma unroll 1
  for (int64_t i = int64_t{s.count} + thread_index(); i < s.room; i += kThreads) {
    p.index[s.out + i] = -1;
  }
  if (s.count == 0) {
    return;
  }
  uint32_t keys[kItems];
  load_keys<T>(keys, p, s.begin, s.begin, int64_t{s.begin} + s.length);
  Bucket bucket = whole_bucket(s);
  if (bucket.settled == 0) {
    clear_histogram<kThreads>(shared);
    sync_threads();
  }
  for (int pass = 0; pass < kDigits<T> && bucket.settled == 0; ++pass) {
    const int shift = digit_shift(pass);
    count_digits(keys, bucket, shift, shared);
    sync_threads();
    bucket = narrow<kThreads>(bucket, shift, shared, [&](int bin) {
      const int32_t count = shared.histogram[bin];
      shared.histogram[bin] = 0;  // for the next pass
      return count;
    });
  }
  const Tallies tallies = tally<kThreads>(keys, bucket, shared);
  emit(keys, bucket, tallies.before, tallies.own, p, s, s.begin);
}

}  // namespace mor
