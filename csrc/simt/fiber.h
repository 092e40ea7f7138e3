// A CUDA thread on the host: a function on a stack of its own that can be left and resumed.
#pragma once

#include <cstddef>

namespace mor::simt {

// Before its first start: the stack that the caller runs on.
class Fiber {
 public:
  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next switch to this fiber calls entry(), which must not return. A fiber that was left in
  // the middle of a call may be started anew. Numbers that differ keep the stacks of fibers out of
  // each other's cache lines.
  void start(void (*entry)(), int number);

  // From this fiber, which runs, to another, until some fiber switches back.
  void switch_to(Fiber& other);

 private:
  static void arrive();
  static void run();
  void unpoison();

  void* registers_ = nullptr;  // as they were when it was left, mostly on its stack
  char* stack_ = nullptr;      // its lowest address
  void (*entry_)() = nullptr;

  // What AddressSanitizer wants to know.
  void* fake_stack_ = nullptr;
  const void* bottom_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace mor::simt
