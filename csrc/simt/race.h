// Finds accesses to shared memory that no barrier orders, whatever order the threads happen to run
// in.
//
// Only barriers (of the block, named, of a warp) order accesses of different threads. Every warp
// counts the barriers that it has come to, and knows of every warp up to which count its accesses
// came before, directly or by way of others: a vector clock. Every piece of shared memory remembers
// its latest write, and of each warp the latest read and the latest atomic update.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <string>
#include <vector>

namespace mor::simt {

enum class Access { kRead, kAtomic, kWrite };

using Clock = std::array<uint32_t, 32>;  // a count for each warp of a block

constexpr int64_t kPiece = 2;  // bytes of shared memory that are looked at as one

class RaceDetector {
 public:
  void start_block(int threads, int64_t shared_bytes);

  // A warp comes to a barrier, and goes on after it: what warps did before they came is ordered
  // before what warps do after they go on.
  void arrive(int warp, Clock& barrier);
  void pass(int warp, const Clock& barrier);

  void warp_barrier(int warp) { known_[warp][warp] = counts_[warp]++; }
  void block_barrier();

  // An access to the bytes [begin, end) of shared memory. False: it is a race, see conflict().
  bool access(int thread, int64_t begin, int64_t end, Access now);

  // An asynchronous copy into bytes that the thread has just written is under way, so that nobody
  // may touch them, or has arrived.
  void copy(int thread, int64_t begin, int64_t end, bool arrived);

  struct Conflict {
    std::string what;
    int64_t byte;
  };
  const Conflict& conflict() const { return conflict_; }

  // For the next block, after one that has not come to its end.
  void forget() { warps_ = 0; }

 private:
  struct Write {
    uint32_t count = 0;  // of the thread's warp
    int16_t thread = 0;
    int16_t copying = 0;  // 1: by a copy that is under way
    bool operator==(const Write& other) const {
      return std::bit_cast<uint64_t>(*this) == std::bit_cast<uint64_t>(other);
    }
  };

  // The latest access of each warp to each piece: count << kLaneBits | lane, or kSeveral.
  struct Marks {
    std::vector<uint32_t> latest;  // [warps, pieces]
    std::vector<uint32_t> warps;   // [pieces]: which have any since the latest write
  };
  static constexpr int kLaneBits = 6;
  static constexpr uint32_t kSeveral = 32, kNone = 33;

  // kPieces: how many, 0: `pieces`. The usual numbers are compiled apart, for speed.
  template <int kPieces>
  bool access_pieces(int thread, int64_t first, int64_t pieces, Access now);

  // Whether an access of the thread comes after all writes, or all others of a kind; else notes the
  // conflict.
  bool after_writes(int thread, int64_t first, int64_t pieces, Access now);
  bool after_marks(Access before, int thread, int64_t first, int64_t pieces, Access now);
  bool conflicts(Access now, const std::string& what, int64_t piece);

  void mark(Marks& marks, int thread, int64_t first, int64_t pieces);

  int warps_ = 0;
  int64_t pieces_ = 0;
  Clock counts_ = {};
  std::array<Clock, 32> known_ = {};  // known_[w]: what comes before the next accesses of warp w
  std::vector<Write> writes_;         // [pieces]
  Marks reads_, atomics_;             // atomics_: empty until there is one
  Conflict conflict_;
};

}  // namespace mor::simt
