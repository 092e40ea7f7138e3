// A CUDA thread on the host: a function on a stack of its own that can be left and resumed.
#pragma once

#include <memory>

namespace mor::simt {

class Fiber {
 public:
  // The stack that the caller runs on.
  Fiber();

  // A stack of its own. Numbers that differ keep the stacks out of each other's cache lines.
  explicit Fiber(int number);

  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next switch to this fiber calls entry(), which must not return. A fiber that was left in
  // the middle of a call may be started anew.
  void start(void (*entry)());

  // From this fiber, which runs, to another, until some fiber switches back.
  void switch_to(Fiber& other);

 private:
  struct Context;
  std::unique_ptr<Context> context_;
};

}  // namespace mor::simt
