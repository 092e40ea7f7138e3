// The state of the block that is running: internal to the executor.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "simt/executor.h"
#include "simt/fiber.h"
#include "simt/race.h"

namespace mor::simt {

// What a thread has come to.
struct Wait {
  const char* name = nullptr;  // of the primitive
  Site site;
  uint32_t mask = 0;        // of a warp primitive
  void* operand = nullptr;  // of a warp primitive
};

// Masks of lanes, and what each lane waits for if it is in none of them.
struct Warp {
  uint32_t lanes = 0;  // that the block has
  uint32_t ready = 0, joining = 0, yielded = 0, returned = 0;
  Wait waits[kWarp];
};

inline constexpr int kCopyBytes = 16;

struct Copy {
  char* to;
  int64_t group;
  char data[kCopyBytes] = {};
};

struct Thread {
  Fiber fiber;
  std::vector<Copy> copies;  // asynchronous, oldest first
  size_t arrived = 0;        // of these copies
  int64_t group = 0;         // of the next copy
};

struct NamedBarrier {
  int threads = 0;
  uint32_t arrived = 0, waiting = 0;  // warps
  Clock clock = {};
};

inline constexpr int kNamedBarriers = 16;

// A piece of shared memory that the kernel has taken.
struct SharedArray {
  int64_t begin, count, element_bytes;
  bool operator==(const SharedArray&) const = default;
};

inline constexpr int kMaxBlock = 1024;

struct Block {
  Launch launch;
  void (*body)(void*) = nullptr;
  void* context = nullptr;

  Fiber scheduler;
  std::unique_ptr<Thread[]> threads{new Thread[kMaxBlock]};
  std::vector<Warp> warps;
  int alive = 0;      // threads
  int idle = 0;       // rounds since a thread returned or passed a barrier
  int arrived = 0;    // threads at the block's barrier
  Site barrier_site;  // of the first of them
  NamedBarrier named[kNamedBarriers];

  std::vector<char> memory;
  char* shared = nullptr;  // aligned, in memory
  std::vector<SharedArray> arrays;
  RaceDetector races;

  std::string error;
};

// The block that this OS thread runs.
extern constinit thread_local Block* current;

inline Thread& thread_of(int index) {
  return current->threads[static_cast<size_t>(index)];
}

// The running thread's copies of groups before this one arrive.
void arrive_copies(int64_t group);

inline Warp& running_warp() {
  return current->warps[static_cast<size_t>(position.thread / kWarp)];
}

inline uint32_t running_lane() {
  return 1u << position.thread % kWarp;
}

}  // namespace mor::simt
