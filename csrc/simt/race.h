// Finds unordered accesses to shared memory, whatever order the threads happen to run in.
//
// Only barriers (of the block, named, of a warp) order accesses of different threads. Every warp
// counts the barriers it has passed, and knows the count of every other warp at the last barrier
// that they had in common, directly or by way of others: an access is ordered before another if the
// latter's warp knows a count past it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mor::simt {

enum class Access { kRead, kWrite, kAtomic };

class RaceDetector {
 public:
  // For a new block: forgets all accesses.
  void reset(int threads, int64_t shared_bytes);

  // All waiting threads' warps know of what all arriving threads' warps did before.
  void barrier(const std::vector<int>& arriving, const std::vector<int>& waiting);
  void block_barrier();
  void warp_barrier(int warp) { tick(warp); }

  // An access to the bytes [begin, end) of shared memory; returns what is wrong with it, or "".
  std::string access(int thread, int64_t begin, int64_t end, Access kind);

  // An asynchronous copy into these bytes starts (nobody may touch them) or arrives.
  std::string copy_starts(int thread, int64_t begin, int64_t end);
  void copy_arrives(int thread, int64_t begin, int64_t end);

 private:
  static constexpr int64_t kGranule = 2;  // bytes that share a record

  struct Event {
    int32_t thread = -1;
    uint32_t count = 0;  // of the thread's warp
    bool atomic = false;
  };
  struct Granule {
    uint64_t block = 0;  // that the rest belongs to
    Event write, reads[2];
    int32_t copying = -1;  // the thread whose copy is under way
  };

  Granule& granule(int64_t i);
  bool ordered(const Event& event, int thread) const;
  std::string conflict(const Granule& record, int thread, Access kind, int64_t offset) const;
  void tick(int warp);

  uint64_t block_ = 0;
  int warps_ = 0;
  std::vector<uint32_t> known_;  // [warps, warps]: row w is what warp w knows, its own count too
  std::vector<Granule> granules_;
};

}  // namespace mor::simt
