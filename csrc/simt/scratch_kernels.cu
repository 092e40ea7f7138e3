// Small kernels, right and wrong on purpose: `scratch_kernels NAME` runs one and prints what it
// gives, or what the executor says is wrong with it.
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "common/launch.cuh"

namespace mor {
namespace {

using Kernel = void (*)(int32_t*);

struct Scratch {
  Kernel kernel;
  int block = 64;
  int64_t shared_bytes = 4 * 64;
  int grid = 1;
};

// ---- right ----

__global__ void reverse(int32_t* out) {
  const Shared<int32_t> s = SharedArena().take<int32_t>(64);
  s[thread_index()] = thread_index();
  sync_threads();
  out[thread_index()] = s[63 - thread_index()];
}

__global__ void scan(int32_t* out) {
  out[thread_index()] = warp_inclusive_scan(thread_index());
}

__global__ void copy_and_wait(int32_t* out) {
  const Shared<int32_t> s = SharedArena().take<int32_t>(64);
  out[thread_index()] = thread_index();
  sync_threads();
  if (thread_index() < 16) {
    copy_async(s + 4 * thread_index(), out + 4 * thread_index(), thread_index() < 8);
    copy_async_commit();
    copy_async_wait<0>();
  }
  sync_threads();
  out[thread_index()] = s[thread_index()] + 1;
}

// The first warp fills, the second reads: a producer and a consumer with named barriers.
__global__ void hand_over(int32_t* out) {
  const Shared<int32_t> s = SharedArena().take<int32_t>(32);
  if (thread_index() < 32) {
    s[thread_index()] = 3 * thread_index();
    arrive_named(1, 64);
  } else {
    sync_named(1, 64);
    out[lane_index()] = s[31 - lane_index()];
  }
}

__global__ void histogram(int32_t* out) {
  const Shared<int32_t> s = SharedArena().take<int32_t>(4);
  if (thread_index() < 4) {
    s[thread_index()] = 0;
  }
  sync_threads();
  atomic_add(s + thread_index() % 3, 1);
  sync_threads();
  out[thread_index()] = s[thread_index() % 4];
}

__global__ void half_warps(int32_t* out) {
  const bool low = lane_index() < 16;
  if (low) {
    out[thread_index()] = static_cast<int32_t>(ballot(lane_index() % 2 == 0, 0x0000ffffu));
  } else {
    out[thread_index()] = static_cast<int32_t>(ballot(lane_index() % 4 == 0, 0xffff0000u) >> 16);
  }
}

__global__ void matches(int32_t* out) {
  out[thread_index()] = static_cast<int32_t>(match_any(static_cast<uint32_t>(lane_index() % 5)));
}

// Block i waits for block i - 1, in an order that the blocks find out as they start.
__global__ void chain(int32_t* out) {
  int32_t ticket = thread_index() == 0 ? atomic_add(out, 1) : 0;
  ticket = shuffle(ticket, 0);
  if (thread_index() == 0) {
    while (ticket > 0 && load_acquire(out + ticket) == 0) {
      spin_pause();
    }
    store_release(out + ticket + 1, ticket == 0 ? 1 : 2 * load_acquire(out + ticket));
  }
}

// Elements of C = A B for A[i][k] = i + k and B[k][j] = k - j, by the documented fragment layout.
__global__ void mma(int32_t* out) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  const auto a_at = [](int i, int k) { return static_cast<float>(i + k); };
  const auto b_at = [](int k, int j) { return static_cast<float>(k - j); };
  uint32_t a[4], b[2];
  float c[4] = {1, 1, 1, 1};
  for (int i = 0; i < 4; ++i) {
    const int row = g + i % 2 * 8, column = 2 * t + i / 2 * 8;
    a[i] = pack<bfloat16>(a_at(row, column), a_at(row, column + 1));
  }
  for (int i = 0; i < 2; ++i) {
    b[i] = pack<bfloat16>(b_at(2 * t + 8 * i, g), b_at(2 * t + 8 * i + 1, g));
  }
  mma_16x8x16<bfloat16>(c, a, b);
  float expected = 1;
  for (int k = 0; k < 16; ++k) {
    expected += a_at(g + 8, k) * b_at(k, 2 * t + 1);
  }
  out[thread_index()] = c[3] == expected;
}

// ---- wrong ----

__global__ void missing_barrier(int32_t* out) {
  const Shared<int32_t> s = SharedArena().take<int32_t>(64);
  s[thread_index()] = thread_index();
  out[thread_index()] = s[63 - thread_index()];
}

__global__ void missing_warp_barrier(int32_t* out) {
  const Shared<int32_t> s = SharedArena().take<int32_t>(64);
  s[thread_index()] = thread_index();
  out[thread_index()] = s[thread_index() ^ 1];
}

__global__ void overwritten_too_soon(int32_t* out) {
  const Shared<int32_t> s = SharedArena().take<int32_t>(64);
  s[thread_index()] = thread_index();
  sync_threads();
  out[thread_index()] = s[63 - thread_index()];
  s[thread_index()] = 0;
}

__global__ void read_before_wait(int32_t* out) {
  const Shared<int32_t> s = SharedArena().take<int32_t>(64);
  if (thread_index() < 16) {
    copy_async(s + 4 * thread_index(), out + 4 * thread_index());
    copy_async_commit();
  }
  sync_threads();
  out[thread_index()] = s[thread_index()];
}

__global__ void read_before_barrier(int32_t* out) {
  const Shared<int32_t> s = SharedArena().take<int32_t>(64);
  if (thread_index() < 16) {
    copy_async(s + 4 * thread_index(), out + 4 * thread_index());
    copy_async_commit();
    copy_async_wait<0>();
  }
  out[thread_index()] = s[thread_index()];
}

__global__ void wait_for_too_few(int32_t* out) {
  const Shared<int32_t> s = SharedArena().take<int32_t>(64);
  if (thread_index() < 16) {
    copy_async(s + 4 * thread_index(), out + 4 * thread_index());
    copy_async_commit();
    copy_async_wait<1>();
  }
  sync_threads();
  out[thread_index()] = s[thread_index()];
}

__global__ void one_past_the_end(int32_t* out) {
  SharedArena arena;
  const Shared<int32_t> s = arena.take<int32_t>(32);
  arena.take<int32_t>(32);
  if (thread_index() <= 32) {
    s[thread_index()] = 1;
  }
  out[thread_index()] = 0;
}

__global__ void more_than_launched(int32_t* out) {
  const Shared<int32_t> s = SharedArena().take<int32_t>(65);
  out[thread_index()] = s[0];
}

__global__ void misaligned_copy(int32_t* out) {
  const Shared<int32_t> s = SharedArena().take<int32_t>(64);
  copy_async(s + 1, out);
}

__global__ void barrier_in_a_branch(int32_t*) {
  if (thread_index() != 40) {
    sync_threads();
  }
}

__global__ void two_barriers(int32_t*) {
  if (thread_index() < 32) {
    sync_threads();
  } else {
    sync_threads();
  }
}

__global__ void shuffle_in_a_branch(int32_t* out) {
  if (lane_index() != 7) {
    out[thread_index()] = shuffle(1, 0);
  }
}

__global__ void different_primitives(int32_t* out) {
  if (lane_index() < 16) {
    out[thread_index()] = shuffle(1, 0);
  } else {
    out[thread_index()] = static_cast<int32_t>(ballot(true));
  }
}

__global__ void not_in_its_mask(int32_t* out) {
  out[thread_index()] = static_cast<int32_t>(ballot(true, 0xffffu));
}

__global__ void endless_wait(int32_t* out) {
  while (load_acquire(out) == 0) {
    spin_pause();
  }
}

const std::map<std::string, Scratch> kScratch = {
    {"reverse", {reverse}},
    {"scan", {scan}},
    {"copy_and_wait", {copy_and_wait}},
    {"hand_over", {hand_over}},
    {"histogram", {histogram}},
    {"half_warps", {half_warps}},
    {"matches", {matches}},
    {"chain", {chain, 32, 0, 10}},
    {"mma", {mma, 32}},
    {"missing_barrier", {missing_barrier}},
    {"missing_warp_barrier", {missing_warp_barrier}},
    {"overwritten_too_soon", {overwritten_too_soon}},
    {"read_before_wait", {read_before_wait}},
    {"read_before_barrier", {read_before_barrier}},
    {"wait_for_too_few", {wait_for_too_few}},
    {"one_past_the_end", {one_past_the_end}},
    {"more_than_launched", {more_than_launched}},
    {"misaligned_copy", {misaligned_copy}},
    {"barrier_in_a_branch", {barrier_in_a_branch}},
    {"two_barriers", {two_barriers}},
    {"shuffle_in_a_branch", {shuffle_in_a_branch}},
    {"different_primitives", {different_primitives}},
    {"not_in_its_mask", {not_in_its_mask}},
    {"endless_wait", {endless_wait}},
};

int run(const std::string& name) {
  const Scratch& scratch = kScratch.at(name);
  alignas(16) int32_t out[64] = {};
  const LaunchShape shape{
      {static_cast<uint32_t>(scratch.grid), 1, 1}, scratch.block, scratch.shared_bytes};
  const cudaError_t error = launch(name.c_str(), scratch.kernel, shape, nullptr, out);
  if (error != cudaSuccess) {
    std::printf("%s\n", cudaGetErrorString(error));
    return 1;
  }
  for (const int32_t value : out) {
    std::printf("%d ", value);
  }
  std::printf("\n");
  return 0;
}

}  // namespace
}  // namespace mor

int main(int argc, char** argv) {
  return argc == 2 && mor::kScratch.contains(argv[1]) ? mor::run(argv[1]) : 2;
}
