// Runs a grid on the host: blocks one after the other, the threads of a block as fibers.
//
// A fiber runs until it must wait for others. What a GPU leaves undefined or lets hang is an error
// here that names the kernel, the block, the thread and the line: a barrier that not all threads
// reach, a warp primitive that not all named lanes reach, shared memory out of range, a race on it,
// a read of what an asynchronous copy has yet to write.
#pragma once

#include <cstdint>
#include <source_location>
#include <string>

namespace mor::simt {

using Site = std::source_location;  // where a kernel calls a primitive

inline constexpr int kWarp = 32;

struct Dim {
  uint32_t x = 1, y = 1, z = 1;
};

struct Launch {
  const char* kernel;
  Dim grid;
  int block;  // threads
  int64_t shared_bytes;
};

// Runs body(context) once per thread; returns what went wrong, or "". Blocks come in a shuffled
// order: nothing may depend on it. Every OS thread may run a grid of its own.
std::string run(const Launch& launch, void (*body)(void*), void* context);

// ---- for primitives, within a kernel ----

struct Position {
  int thread = -1;  // -1: no kernel runs on this OS thread
  int block_size = 0;
  Dim block, grid;
};

extern constinit thread_local Position position;

inline int thread_index() {
  return position.thread;
}

inline int block_size() {
  return position.block_size;
}

inline Dim block_index() {
  return position.block;
}

inline Dim grid_size() {
  return position.grid;
}

// The thread that is the given lane of the running thread's warp.
inline int thread_of_lane(int lane) {
  return position.thread / kWarp * kWarp + lane;
}

// Ends the launch with an error: message, then kernel, block, thread and site.
[[noreturn]] void fail(const std::string& message, Site site, int thread = thread_index());

// Lets the other threads run; for loops that wait.
void yield();

void sync_threads(Site site);

// All lanes of a warp together; wait: for the other warps.
void sync_named(int id, int threads, bool wait, Site site);

// Waits until every lane of the mask has called this from the same place. The last one calls
// complete(operands, mask), operands by lane; then all go on.
using Complete = void (*)(void* const* operands, uint32_t mask);
void collective(uint32_t mask, const char* name, Site site, void* operand, Complete complete);

}  // namespace mor::simt
