// The state of the block that is running: internal to the executor.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <source_location>
#include <string>
#include <vector>

#include "simt/executor.h"
#include "simt/fiber.h"
#include "simt/race.h"

namespace mor::simt {

// What a waiting thread waits for.
struct Wait {
  const char* name = nullptr;  // of the primitive; null: it does not wait
  std::source_location site;
  uint32_t mask = 0;        // of a warp primitive
  void* operand = nullptr;  // of a warp primitive
};

struct Copy {
  char* to;
  const char* from;
  int64_t bytes, valid_bytes, group;
};

struct Thread {
  Fiber fiber;
  bool done = false;
  Wait wait;
  std::deque<Copy> copies;  // that are under way, oldest first
  int64_t group = 0;        // of the next copy
};

struct NamedBarrier {
  int threads = 0;
  std::vector<int> arrived;  // threads, those that wait and those that do not
};

constexpr int kNamedBarriers = 16;

struct Block {
  Launch launch;
  Dim index;
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  std::deque<Thread> threads;  // as many as the largest block so far
  int running = -1;
  int arrived = 0;  // at the block's barrier
  bool progress = false;
  NamedBarrier named[kNamedBarriers];
  std::unique_ptr<char[]> memory;
  char* shared = nullptr;  // 128-byte aligned, in memory
  int64_t shared_capacity = 0;
  RaceDetector races;
  std::string error;
};

// The block that this OS thread runs.
Block& current_block();

inline Thread& current_thread() {
  Block& block = current_block();
  return block.threads[static_cast<size_t>(block.running)];
}

}  // namespace mor::simt
