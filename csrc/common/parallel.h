// Torch's own thread pool, for kernel files that include no torch header.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace mor {

// A borrowed callable void(begin, end); lives no longer than the call it is passed to.
class RangeFunction {
 public:
  template <typename F>
    requires(!std::is_same_v<std::remove_cvref_t<F>, RangeFunction>)
  RangeFunction(F&& f)  // NOLINT: implicit by design
      : object_(const_cast<void*>(static_cast<const void*>(std::addressof(f)))),
        call_([](void* object, int64_t begin, int64_t end) {
          (*static_cast<std::remove_reference_t<F>*>(object))(begin, end);
        }) {}

  void operator()(int64_t begin, int64_t end) const { call_(object_, begin, end); }

 private:
  void* object_;
  void (*call_)(void*, int64_t, int64_t);
};

// Splits [0, count) into one contiguous range a thread, none shorter than grain.
void parallel_for(int64_t count, int64_t grain, RangeFunction body);

// Hands the tasks 0..count-1 out one by one, in order, to whichever thread is free:
// for tasks of unequal cost. body sees ranges of length one.
void parallel_tasks(int64_t count, RangeFunction body);

int64_t num_threads();

}  // namespace mor
