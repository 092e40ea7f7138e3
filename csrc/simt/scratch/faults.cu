// Mistakes, one in each kernel, found where `// fails: NAME` stands.
#include <stdexcept>

#include "simt/scratch/scratch.h"

namespace mor {
namespace {

__device__ Shared<int32_t> words(int count = 64) {
  return SharedArena().take<int32_t>(count);
}

// ---- races ----

__global__ void missing_barrier(int32_t* data) {
  const auto s = words();
  s[thread_index()] = thread_index();  // fails: missing_barrier
  data[thread_index()] = s[63 - thread_index()];
}

__global__ void missing_warp_barrier(int32_t* data) {
  const auto s = words();
  s[thread_index()] = thread_index();  // fails: missing_warp_barrier
  data[thread_index()] = s[thread_index() ^ 1];
}

__global__ void overwritten_too_soon(int32_t* data) {
  const auto s = words();
  s[thread_index()] = thread_index();
  sync_threads();
  data[thread_index()] = s[63 - thread_index()];  // fails: overwritten_too_soon
  s[thread_index()] = 0;
}

__global__ void shuffle_is_no_barrier(int32_t* data) {
  const auto s = words();
  s[thread_index()] = thread_index();
  const int32_t other = shuffle_xor(lane_index(), 1);
  data[thread_index()] = s[other];  // fails: shuffle_is_no_barrier
}

__global__ void part_of_a_warp(int32_t* data) {
  const auto s = words();
  s[thread_index()] = thread_index();  // fails: part_of_a_warp
  if (lane_index() < 16) {
    sync_warp(0xffffu);
  }
  data[thread_index()] = s[thread_index() ^ 16];
}

__global__ void two_writers(int32_t*) {
  const auto s = words();
  s[thread_index() / 2] = 1;  // fails: two_writers
}

__global__ void two_writing_warps(int32_t*) {
  const auto s = words();
  s[lane_index()] = 1;  // fails: two_writing_warps
}

// Half of an element of 4 bytes.
__global__ void half_an_element(int32_t* data) {
  const auto s = words();
  if (thread_index() == 32) {
    s.as<bfloat16>()[7] = bfloat16{1};
  }
  if (thread_index() == 33) {
    data[0] = s[3];  // fails: half_an_element
  }
}

__global__ void atomic_and_read(int32_t* data) {
  const auto s = words();
  atomic_add(s + thread_index() / 8, 1);  // fails: atomic_and_read
  data[thread_index()] = s[0];
}

__global__ void atomic_and_write(int32_t*) {
  const auto s = words();
  if (lane_index() == 0) {
    s[0] = 0;
  }
  atomic_add(s, 1);  // fails: atomic_and_write
}

__global__ void write_and_atomics(int32_t*) {
  const auto s = words();
  if (thread_index() < 32) {
    atomic_add(s, 1);
  } else if (lane_index() == 3) {
    s[0] = 0;  // fails: write_and_atomics
  }
}

// The barrier covers what its warp has done before it arrived.
__global__ void written_after_arrival(int32_t* data) {
  const auto s = words();
  if (thread_index() < 32) {
    arrive_named(1, 64);
    s[lane_index()] = 1;
  } else {
    sync_named(1, 64);
    data[lane_index()] = s[lane_index()];  // fails: written_after_arrival
  }
}

// ---- asynchronous copies ----

template <bool kWait, bool kBarrier, int kPending>
__global__ void copies(int32_t* data) {
  const auto s = words();
  const int t = thread_index();
  if (t < 16) {
    copy_async(s + 4 * t, data + 4 * t);
    copy_async_commit();
    if (kWait) {
      copy_async_wait<kPending>();
    }
  }
  if (kBarrier) {
    sync_threads();
  }
  data[t] = s[t];  // fails: read_before_wait, read_before_barrier, wait_for_too_few
}

__global__ void wait_without_commit(int32_t* data) {
  const auto s = words();
  if (thread_index() == 0) {
    copy_async(s, data);
    copy_async_wait<0>();
    data[0] = s[3];  // fails: wait_without_commit
  }
}

__global__ void two_copies_to_one_place(int32_t* data) {
  const auto s = words();
  if (thread_index() == 0) {
    copy_async(s, data);
    copy_async(s, data + 4);  // fails: two_copies_to_one_place
  }
}

__global__ void misaligned_copy(int32_t* data) {
  const auto s = words();
  copy_async(s + 1, data);  // fails: misaligned_copy
}

__global__ void copy_from_misaligned(int32_t* data) {
  const auto s = words();
  copy_async(s, data + 2);  // fails: copy_from_misaligned
}

// ---- out of range ----

__global__ void one_past_the_end(int32_t*) {
  SharedArena arena;
  const auto s = arena.take<int32_t>(32);
  arena.take<int32_t>(32);
  if (thread_index() <= 32) {
    s[thread_index()] = 1;  // fails: one_past_the_end
  }
}

__global__ void before_the_begin(int32_t* data) {
  const auto s = words();
  data[0] = (s + thread_index())[-1];  // fails: before_the_begin
}

__global__ void vector_past_the_end(int32_t* data) {
  const auto s = words(62).as<Vector<int32_t, 4>>();
  const Vector<int32_t, 4> v = s[15 - thread_index() / 4];  // fails: vector_past_the_end
  data[thread_index()] = v[0];
}

__global__ void misaligned_vector(int32_t* data) {
  const auto s = (words() + 2).as<Vector<int32_t, 4>>();
  const Vector<int32_t, 4> v = s[1];  // fails: misaligned_vector
  data[thread_index()] = v[0];
}

__global__ void far_out_of_range(int32_t* data) {
  const auto s = words();
  data[0] = s[int64_t{1} << 61];  // fails: far_out_of_range
}

__global__ void more_than_launched(int32_t* data) {
  const auto s = SharedArena().take<int32_t>(65);  // fails: more_than_launched
  data[thread_index()] = s[0];
}

__global__ void matrix_out_of_range(int32_t*) {
  const auto s = words();
  uint32_t fragment[4];
  load_matrix_x4(fragment, s + 4 * lane_index());  // fails: matrix_out_of_range
}

// Lane 9 reads what lane 3 has written.
__global__ void matrix_race(int32_t*) {
  const auto s = words(128);
  s[4 * lane_index()] = 0;
  sync_warp();
  if (lane_index() == 3) {
    s[4 * 9 + 2] = 1;
  }
  uint32_t fragment[4];
  load_matrix_x4(fragment, s + 4 * lane_index());  // fails: matrix_race
}

// ---- barriers that not all reach ----

__global__ void barrier_in_a_branch(int32_t*) {
  if (thread_index() != 40) {
    sync_threads();  // waits: barrier_in_a_branch
  }
}

__global__ void two_barriers(int32_t*) {
  if (thread_index() < 32) {
    sync_threads();  // waits: two_barriers
  } else {
    sync_threads();  // fails: two_barriers
  }
}

__global__ void part_of_a_warp_at_a_named_barrier(int32_t*) {
  if (lane_index() != 5) {
    sync_named(1, 64);  // waits: part_of_a_warp_at_a_named_barrier
  } else {
    sync_threads();  // waits: part_of_a_warp_at_a_named_barrier
  }
}

__global__ void too_few_warps(int32_t*) {
  if (thread_index() < 32) {
    sync_named(2, 64);  // waits: too_few_warps
  }
}

__global__ void barrier_0(int32_t*) {
  sync_named(0, 64);  // fails: barrier_0
}

__global__ void barrier_16(int32_t*) {
  arrive_named(16, 64);  // fails: barrier_16
}

__global__ void barrier_for_a_warp_and_a_half(int32_t*) {
  sync_named(1, 48);  // fails: barrier_for_a_warp_and_a_half
}

__global__ void barrier_for_more_than_the_block(int32_t*) {
  sync_named(1, 96);  // fails: barrier_for_more_than_the_block
}

__global__ void barrier_for_32_and_64(int32_t*) {
  sync_named(1, thread_index() < 32 ? 64 : 32);  // fails: barrier_for_32_and_64
}

__global__ void lanes_at_two_named_barriers(int32_t*) {
  sync_named(1 + lane_index() % 2, 64);  // fails: lanes_at_two_named_barriers
}

__global__ void endless_wait(int32_t* data) {
  while (load_acquire(data) == 0) {
    spin_pause();
  }
}

// ---- warp primitives that not all named lanes reach ----

__global__ void shuffle_in_a_branch(int32_t* data) {
  if (lane_index() != 7) {
    data[thread_index()] = shuffle(1, 0);  // fails: shuffle_in_a_branch
  }
}

// As above, but nobody comes after the lane that returns.
__global__ void shuffle_without_the_last(int32_t* data) {
  if (lane_index() != 31) {
    data[thread_index()] = shuffle(1, 0);  // waits: shuffle_without_the_last
  }
}

__global__ void lanes_that_the_block_lacks(int32_t* data) {
  data[thread_index()] = static_cast<int32_t>(ballot(true));  // fails: lanes_that_the_block_lacks
}

__global__ void different_primitives(int32_t* data) {
  if (lane_index() < 16) {
    data[thread_index()] = shuffle(1, 0);  // waits: different_primitives
  } else {
    data[thread_index()] = static_cast<int32_t>(ballot(true));  // fails: different_primitives
  }
}

__global__ void different_masks(int32_t* data) {
  const uint32_t mask = lane_index() < 16 ? kAllLanes : 0xffff0001u;
  data[thread_index()] = shuffle(1, 0, mask);  // fails: different_masks
}

__global__ void not_in_its_mask(int32_t* data) {
  data[thread_index()] = static_cast<int32_t>(ballot(true, 0xffffu));  // fails: not_in_its_mask
}

__global__ void from_a_lane_that_takes_no_part(int32_t* data) {
  if (lane_index() < 16) {
    data[thread_index()] = shuffle_down(1, 4, 0xffffu);  // fails: from_a_lane_that_takes_no_part
  }
}

__global__ void half_a_warp_multiplies(int32_t*) {
  if (lane_index() < 16) {
    const uint32_t a[4] = {}, b[2] = {};
    float c[4];
    mma_16x8x16<bfloat16>(c, a, b);  // waits: half_a_warp_multiplies
  }
}

// ---- what the sanitizers find ----

#if defined(__SANITIZE_ADDRESS__)
__global__ void past_global_memory(int32_t* data) {
  data[kWords + thread_index()] = 1;
}

__global__ void copy_past_global_memory(int32_t* data) {
  const auto s = words();
  if (thread_index() < 16) {
    copy_async(s + 4 * thread_index(), data + kWords + 4 * thread_index());
  }
}

__global__ void misaligned_global_vector(int32_t* data) {
  reinterpret_cast<Vector<int32_t, 4>*>(data + 1)[thread_index()] = {};
}

__global__ void signed_overflow(int32_t* data) {
  data[thread_index()] = 0x7fffffff - 32 + thread_index();
}
#endif

// ---- launches ----

__global__ void nothing(int32_t*) {}

__global__ void launch_in_a_kernel(int32_t* data) {
  const cudaError_t error = launch("nothing", nothing, {{1, 1, 1}, 32}, nullptr, data);
  throw std::runtime_error(cudaGetErrorString(error));
}

}  // namespace

ScratchKernels fault_kernels() {
  const auto one_warp = [](auto kernel) { return Scratch{kernel, 32}; };
  const auto shape = [](int block, int64_t shared_bytes, Index3 grid) {
    return Scratch{nothing, block, shared_bytes, grid};
  };
  return {
      {"missing_barrier", {missing_barrier, 64, 256, {3, 2, 1}}},
      {"missing_barrier", {missing_barrier, 64, 256, {3, 2, 1}}},
      {"missing_warp_barrier", {missing_warp_barrier}},
      {"overwritten_too_soon", {overwritten_too_soon}},
      {"shuffle_is_no_barrier", {shuffle_is_no_barrier}},
      {"part_of_a_warp", {part_of_a_warp}},
      {"two_writers", {two_writers}},
      {"two_writing_warps", {two_writing_warps}},
      {"half_an_element", {half_an_element}},
      {"atomic_and_read", {atomic_and_read}},
      {"atomic_and_write", {atomic_and_write}},
      {"write_and_atomics", {write_and_atomics}},
      {"written_after_arrival", {written_after_arrival}},
      {"read_before_wait", {copies<false, true, 0>}},
      {"read_before_barrier", {copies<true, false, 0>}},
      {"wait_for_too_few", {copies<true, true, 1>}},
      {"wait_without_commit", {wait_without_commit}},
      {"two_copies_to_one_place", {two_copies_to_one_place}},
      {"misaligned_copy", {misaligned_copy}},
      {"copy_from_misaligned", {copy_from_misaligned}},
      {"one_past_the_end", {one_past_the_end}},
      {"before_the_begin", {before_the_begin}},
      {"vector_past_the_end", {vector_past_the_end}},
      {"misaligned_vector", {misaligned_vector}},
      {"far_out_of_range", {far_out_of_range}},
      {"more_than_launched", {more_than_launched}},
      {"matrix_out_of_range", one_warp(matrix_out_of_range)},
      {"matrix_race", {matrix_race, 32, 512}},
      {"barrier_in_a_branch", {barrier_in_a_branch}},
      {"two_barriers", {two_barriers}},
      {"part_of_a_warp_at_a_named_barrier", {part_of_a_warp_at_a_named_barrier}},
      {"too_few_warps", {too_few_warps}},
      {"barrier_0", {barrier_0}},
      {"barrier_16", {barrier_16}},
      {"barrier_for_a_warp_and_a_half", {barrier_for_a_warp_and_a_half}},
      {"barrier_for_more_than_the_block", {barrier_for_more_than_the_block}},
      {"barrier_for_32_and_64", {barrier_for_32_and_64}},
      {"lanes_at_two_named_barriers", {lanes_at_two_named_barriers}},
      {"endless_wait", {endless_wait}},
      {"shuffle_in_a_branch", {shuffle_in_a_branch}},
      {"shuffle_without_the_last", one_warp(shuffle_without_the_last)},
      {"lanes_that_the_block_lacks", {lanes_that_the_block_lacks, 40}},
      {"different_primitives", {different_primitives}},
      {"different_masks", {different_masks}},
      {"not_in_its_mask", {not_in_its_mask}},
      {"from_a_lane_that_takes_no_part", {from_a_lane_that_takes_no_part}},
      {"half_a_warp_multiplies", one_warp(half_a_warp_multiplies)},
      {"launch_in_a_kernel", {launch_in_a_kernel}},
#if defined(__SANITIZE_ADDRESS__)
      {"past_global_memory", {past_global_memory}},
      {"copy_past_global_memory", {copy_past_global_memory}},
      {"misaligned_global_vector", {misaligned_global_vector}},
      {"signed_overflow", {signed_overflow}},
#endif
      {"too_many_threads", shape(1025, 0, {1, 1, 1})},
      {"too_many_blocks", shape(32, 0, {1, 65536, 1})},
      {"too_much_shared_memory", shape(32, 200000, {1, 1, 1})},
      {"no_blocks", shape(32, 0, {1, 0, 1})},
  };
}

}  // namespace mor
