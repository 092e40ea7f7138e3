#include "simt/race.h"

#include <algorithm>
#include <cstddef>

namespace mor::simt {
namespace {

constexpr int kWarp = 32;

std::string description(const char* what, int thread, int64_t offset) {
  return std::string(what) + " thread " + std::to_string(thread) + ", without a barrier between, " +
         "at byte " + std::to_string(offset) + " of shared memory";
}

}  // namespace

void RaceDetector::reset(int threads, int64_t shared_bytes) {
  ++block_;
  warps_ = (threads + kWarp - 1) / kWarp;
  known_.assign(static_cast<size_t>(warps_) * warps_, 0);
  for (int w = 0; w < warps_; ++w) {
    tick(w);
  }
  const auto granules = static_cast<size_t>((shared_bytes + kGranule - 1) / kGranule);
  if (granules_.size() < granules) {
    granules_.resize(granules);
  }
}

void RaceDetector::tick(int warp) {
  ++known_[static_cast<size_t>(warp) * warps_ + warp];
}

void RaceDetector::barrier(const std::vector<int>& arriving, const std::vector<int>& waiting) {
  std::vector<uint32_t> joined(static_cast<size_t>(warps_), 0);
  std::vector<bool> warp_arrives(static_cast<size_t>(warps_), false);
  for (const int thread : arriving) {
    warp_arrives[static_cast<size_t>(thread / kWarp)] = true;
  }
  for (int w = 0; w < warps_; ++w) {
    for (int other = 0; warp_arrives[w] && other < warps_; ++other) {
      joined[other] = std::max(joined[other], known_[static_cast<size_t>(w) * warps_ + other]);
    }
  }
  for (const int thread : waiting) {
    std::copy(joined.begin(), joined.end(),
              known_.begin() + static_cast<ptrdiff_t>(thread / kWarp) * warps_);
  }
  for (int w = 0; w < warps_; ++w) {
    if (warp_arrives[w]) {
      tick(w);
    }
  }
}

void RaceDetector::block_barrier() {
  std::vector<int> one_of_each_warp;
  for (int w = 0; w < warps_; ++w) {
    one_of_each_warp.push_back(w * kWarp);
  }
  barrier(one_of_each_warp, one_of_each_warp);
}

RaceDetector::Granule& RaceDetector::granule(int64_t i) {
  Granule& record = granules_[static_cast<size_t>(i)];
  if (record.block != block_) {
    record = Granule{};
    record.block = block_;
  }
  return record;
}

bool RaceDetector::ordered(const Event& event, int thread) const {
  if (event.thread < 0 || event.thread == thread) {
    return true;
  }
  const size_t own = static_cast<size_t>(thread / kWarp);
  const size_t other = static_cast<size_t>(event.thread / kWarp);
  const uint32_t known = known_[own * warps_ + other];
  return own == other ? known > event.count : known >= event.count;
}

std::string RaceDetector::conflict(const Granule& record, int thread, Access kind,
                                   int64_t offset) const {
  if (record.copying >= 0) {
    return "access to what a copy_async of thread " + std::to_string(record.copying) +
           " has yet to write, at byte " + std::to_string(offset) + " of shared memory";
  }
  const bool both_atomic = kind == Access::kAtomic && record.write.atomic;
  if (!both_atomic && !ordered(record.write, thread)) {
    return description(
        kind == Access::kRead ? "read of what was written by" : "write over what was written by",
        record.write.thread, offset);
  }
  for (const Event& read : record.reads) {
    if (kind != Access::kRead && !ordered(read, thread)) {
      return description("write over what is read by", read.thread, offset);
    }
  }
  return "";
}

std::string RaceDetector::access(int thread, int64_t begin, int64_t end, Access kind) {
  const size_t own = static_cast<size_t>(thread / kWarp);
  const Event event{thread, known_[own * warps_ + own], kind == Access::kAtomic};
  for (int64_t i = begin / kGranule; i * kGranule < end; ++i) {
    Granule& record = granule(i);
    if (std::string wrong = conflict(record, thread, kind, i * kGranule); !wrong.empty()) {
      return wrong;
    }
    if (kind != Access::kRead) {
      record.write = event;
    } else if (record.reads[0].thread == thread || ordered(record.reads[0], thread)) {
      record.reads[0] = event;
    } else {
      record.reads[1] = event;
    }
  }
  return "";
}

std::string RaceDetector::copy_starts(int thread, int64_t begin, int64_t end) {
  std::string wrong = access(thread, begin, end, Access::kWrite);
  for (int64_t i = begin / kGranule; wrong.empty() && i * kGranule < end; ++i) {
    granule(i).copying = thread;
  }
  return wrong;
}

void RaceDetector::copy_arrives(int thread, int64_t begin, int64_t end) {
  const size_t own = static_cast<size_t>(thread / kWarp);
  for (int64_t i = begin / kGranule; i * kGranule < end; ++i) {
    Granule& record = granule(i);
    record.copying = -1;
    record.write = {thread, known_[own * warps_ + own], false};
  }
}

}  // namespace mor::simt
