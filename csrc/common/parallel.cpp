#include "common/parallel.h"

#include <algorithm>
#include <atomic>

#include "torch_abi.h"

namespace mor {

void parallel_for(int64_t count, int64_t grain, RangeFunction body) {
  if (count <= 0) {
    return;
  }
  abi::parallel_for(
      count, grain,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<RangeFunction*>(context))(begin, end);
      },
      &body);
}

void parallel_tasks(int64_t count, RangeFunction body) {
  std::atomic<int64_t> next{0};
  parallel_for(std::min(count, num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t task = next++; task < count; task = next++) {
      body(task, task + 1);
    }
  });
}

int64_t num_threads() {
  return abi::num_threads();
}

}  // namespace mor
