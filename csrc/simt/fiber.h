// A CUDA thread on the host: a function on a stack of its own that can be left and resumed.
#pragma once

#include <cstddef>

namespace mor::simt {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() calls entry(argument) from its start; entry must not return but leave() for
  // the last time. A fiber that was left in the middle of a call may be started anew.
  void start(void (*entry)(void*), void* argument);

  // Runs the fiber until it calls leave(); not from within a fiber.
  void resume();

  // Back to resume()'s caller; from within the fiber.
  void leave();

 private:
  struct Context;
  static thread_local Context* starting;
  static void run();

  Context* context_;
};

}  // namespace mor::simt
