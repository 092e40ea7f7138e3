#include "simt/race.h"

#include <algorithm>
#include <bit>

namespace mor::simt {
namespace {

constexpr int kWarp = 32;
constexpr uint32_t kMaxCount = 1 << 24;  // so that a block's barriers do not reach 1 << 26

// By Access.
constexpr const char* kNow[] = {"read of", "atomic update of", "write over"};
constexpr const char* kBefore[] = {"read", "atomically updated", "wrote"};

}  // namespace

void RaceDetector::start_block(int threads, int64_t shared_bytes) {
  const int warps = (threads + kWarp - 1) / kWarp;
  const int64_t pieces = (shared_bytes + kPiece - 1) / kPiece;
  if (warps == warps_ && pieces == pieces_ && *std::ranges::max_element(counts_) < kMaxCount) {
    return block_barrier();  // this block comes after the one before
  }
  warps_ = warps;
  pieces_ = pieces;
  known_ = {};
  counts_.fill(1);
  writes_.assign(static_cast<size_t>(pieces), Write{});
  reads_.latest.assign(static_cast<size_t>(warps * pieces), 0);
  reads_.warps.assign(static_cast<size_t>(pieces), 0);
  atomics_ = {};
}

void RaceDetector::arrive(int warp, Clock& barrier) {
  for (int w = 0; w < kWarp; ++w) {
    barrier[w] = std::max(barrier[w], known_[warp][w]);
  }
  barrier[warp] = counts_[warp]++;
}

void RaceDetector::pass(int warp, const Clock& barrier) {
  for (int w = 0; w < kWarp; ++w) {
    known_[warp][w] = std::max(known_[warp][w], barrier[w]);
  }
}

void RaceDetector::block_barrier() {
  for (int w = 0; w < warps_; ++w) {
    known_[w] = counts_;
  }
  for (int w = 0; w < warps_; ++w) {
    ++counts_[w];
  }
}

bool RaceDetector::conflicts(Access now, const std::string& what, int64_t piece) {
  conflict_ = {kNow[static_cast<int>(now)] + (" what " + what), piece * kPiece};
  return false;
}

[[gnu::always_inline]] inline bool RaceDetector::after_writes(int thread, int64_t first,
                                                              int64_t pieces, Access now) {
  const Clock& known = known_[thread / kWarp];
  const Write* writes = &writes_[first];
  bool alike = true;  // mostly all pieces of an access were written at once
  for (int64_t i = 1; i < pieces; ++i) {
    alike &= writes[i] == writes[0];
  }
  for (int64_t i = 0; i < (alike ? 1 : pieces); ++i) {
    const auto [count, writer, copying] = writes[i];
    if (copying || (writer != thread && count > known[writer / kWarp])) [[unlikely]] {
      return conflicts(now,
                       (copying ? "the copy_async of thread " : "thread ") +
                           std::to_string(writer) +
                           (copying ? " has yet to write" : " wrote, with no barrier between"),
                       first + i);
    }
  }
  return true;
}

[[gnu::always_inline]] inline bool RaceDetector::after_marks(Access before, int thread,
                                                             int64_t first, int64_t pieces,
                                                             Access now) {
  const Marks& marks = before == Access::kRead ? reads_ : atomics_;
  if (marks.warps.empty()) {
    return true;
  }
  uint32_t warps = 0;
  for (int64_t i = 0; i < pieces; ++i) {
    warps |= marks.warps[first + i];
  }
  for (; warps != 0; warps &= warps - 1) {
    const int w = std::countr_zero(warps);
    const uint32_t first_unordered = (known_[thread / kWarp][w] + 1) << kLaneBits;
    const uint32_t own_lane = w == thread / kWarp ? thread % kWarp : kNone;
    const uint32_t* of_warp = &marks.latest[w * pieces_ + first];
    const auto unordered = [&](int64_t i) {
      return of_warp[i] >= first_unordered && of_warp[i] % (1 << kLaneBits) != own_lane;
    };
    bool any = false;
    for (int64_t i = 0; i < pieces; ++i) {
      any |= unordered(i);
    }
    for (int64_t i = 0; any; ++i) {
      if (unordered(i)) {
        const uint32_t lane = of_warp[i] % (1 << kLaneBits);
        return conflicts(now,
                         (lane == kSeveral ? "several threads of warp " + std::to_string(w)
                                           : "thread " + std::to_string(w * kWarp + lane)) +
                             " " + kBefore[static_cast<int>(before)] + ", with no barrier between",
                         first + i);
      }
    }
  }
  return true;
}

[[gnu::always_inline]] inline void RaceDetector::mark(Marks& marks, int thread, int64_t first,
                                                      int64_t pieces) {
  if (marks.warps.empty()) {
    marks.latest.assign(static_cast<size_t>(warps_ * pieces_), 0);
    marks.warps.assign(static_cast<size_t>(pieces_), 0);
  }
  const int warp = thread / kWarp;
  const uint32_t lane = thread % kWarp, count = counts_[warp] << kLaneBits;
  const uint32_t first_unordered = (known_[warp][warp] + 1) << kLaneBits;
  uint32_t* of_warp = &marks.latest[warp * pieces_ + first];
  for (int64_t i = 0; i < pieces; ++i) {
    const bool several = of_warp[i] >= first_unordered && of_warp[i] % (1 << kLaneBits) != lane;
    of_warp[i] = several ? count | kSeveral : count | lane;
  }
  for (int64_t i = 0; i < pieces; ++i) {
    marks.warps[first + i] |= 1u << warp;
  }
}

template <int kPieces>
bool RaceDetector::access_pieces(int thread, int64_t first, int64_t pieces, Access now) {
  pieces = kPieces > 0 ? kPieces : pieces;
  if (!after_writes(thread, first, pieces, now) ||
      (now != Access::kRead && !after_marks(Access::kRead, thread, first, pieces, now)) ||
      (now != Access::kAtomic && !after_marks(Access::kAtomic, thread, first, pieces, now))) {
    return false;
  }
  if (now == Access::kWrite) {
    std::fill_n(&writes_[first], pieces,
                Write{counts_[thread / kWarp], static_cast<int16_t>(thread)});
    std::fill_n(&reads_.warps[first], pieces, 0);
    if (!atomics_.warps.empty()) {
      std::fill_n(&atomics_.warps[first], pieces, 0);
    }
  } else {
    mark(now == Access::kRead ? reads_ : atomics_, thread, first, pieces);
  }
  return true;
}

bool RaceDetector::access(int thread, int64_t begin, int64_t end, Access now) {
  const int64_t first = begin / kPiece, pieces = (end + kPiece - 1) / kPiece - first;
  switch (pieces) {
    case 1:
      return access_pieces<1>(thread, first, pieces, now);
    case 2:
      return access_pieces<2>(thread, first, pieces, now);
    case 8:
      return access_pieces<8>(thread, first, pieces, now);
    default:
      return access_pieces<0>(thread, first, pieces, now);
  }
}

void RaceDetector::copy(int thread, int64_t begin, int64_t end, bool arrived) {
  const int64_t first = begin / kPiece, pieces = (end + kPiece - 1) / kPiece - first;
  std::fill_n(&writes_[first], pieces,
              Write{counts_[thread / kWarp], static_cast<int16_t>(thread), !arrived});
}

}  // namespace mor::simt
