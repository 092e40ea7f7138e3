// Runs a grid on the host: blocks one after the other, the threads of a block as fibers.
//
// A fiber runs until it must wait for others. What a GPU leaves undefined or lets hang is an error
// here that names the kernel, the block and the thread: a barrier that not all threads reach, a
// warp primitive that not all named lanes reach, shared memory out of range, a race on it, a read
// of what an asynchronous copy has yet to write.
#pragma once

#include <cstdint>
#include <memory>
#include <source_location>
#include <string>
#include <type_traits>

namespace mor::simt {

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
// order: nothing may depend on it.
std::string run(const Launch& launch, void (*body)(void*), void* context);

// ---- for primitives, within a kernel ----

int thread_index();
int block_size();
Dim block_index();
Dim grid_size();

// Ends the launch with an error: message, then kernel, block and thread.
[[noreturn]] void fail(const std::string& message);

// Lets the other threads run; for loops that wait.
void yield();

void sync_threads(std::source_location site);
void sync_named(int id, int threads, bool wait, std::source_location site);

// Waits until every lane of the mask has called this from the same place. The last one calls
// complete(operands, mask), operands by lane; then all go on.
using Complete = void (*)(void* const* operands, uint32_t mask);
void collective(uint32_t mask, const char* name, std::source_location site, void* operand,
                Complete complete);

// The thread of the block that is the given lane of the running thread's warp.
int thread_of_lane(int lane);

}  // namespace mor::simt
