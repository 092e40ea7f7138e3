// What each primitive gives: python_tests/test_simt.py computes the same numbers on its own.
#include "simt/scratch/scratch.h"

namespace mor {
namespace {

// ---- grid, block, shared memory, barriers ----

// data[block's number] = a code of where it is in a grid of 4 x 3 x 2.
__global__ void blocks(int32_t* data) {
  const Index3 b = block_index(), grid = grid_size();
  if (thread_index() == 0) {
    data[(b.z * grid.y + b.y) * grid.x + b.x] =
        static_cast<int32_t>(100 * b.z + 10 * b.y + b.x) + 1000 * block_size();
  }
}

__global__ void reverse(int32_t* data) {
  const Shared<int32_t> s = SharedArena().take<int32_t>(64);
  s[thread_index()] = thread_index();
  sync_threads();
  data[thread_index()] = s[63 - thread_index()];
}

// A block of two and a half warps.
__global__ void reverse_80(int32_t* data) {
  const Shared<int32_t> s = SharedArena().take<int32_t>(80);
  s[thread_index()] = thread_index();
  sync_threads();
  data[thread_index()] = s[79 - thread_index()];
}

// Shared memory starts as NaN, not as zeros.
__global__ void not_written(int32_t* data) {
  const Shared<int32_t> s = SharedArena().take<int32_t>(64);
  data[thread_index()] = s[thread_index()];
}

__global__ void no_shared_memory(int32_t* data) {
  sync_threads();
  data[thread_index()] = 1;
}

// Neighbouring elements of 2 bytes by different threads, read as vectors of 16 bytes.
__global__ void small_elements(int32_t* data) {
  const Shared<bfloat16> s = SharedArena().take<bfloat16>(128);
  s[2 * thread_index() + 1] = bfloat16{static_cast<uint16_t>(thread_index())};
  s[2 * thread_index()] = bfloat16{7};
  sync_threads();
  const Vector<uint32_t, 4> v = s.as<Vector<uint32_t, 4>>()[thread_index() / 4];
  data[thread_index()] = static_cast<int32_t>(v[thread_index() % 4]);
}

// Each pair of warps has its own.
__global__ void named_barriers(int32_t* data) {
  const Shared<int32_t> s = SharedArena().take<int32_t>(128);
  s[thread_index()] = thread_index();
  sync_named(1 + thread_index() / 64, 64);
  data[thread_index()] = s[thread_index() ^ 32];
}

// Only what a warp has written by itself.
__global__ void warp_barrier(int32_t* data) {
  const Shared<int32_t> s = SharedArena().take<int32_t>(40);
  const int lanes = thread_index() < 32 ? 32 : 8;
  const int first = thread_index() / 32 * 32;
  s[thread_index()] = thread_index();
  sync_warp(lanes == 32 ? kAllLanes : 0xffu);
  data[thread_index()] = s[first + lanes - 1 - lane_index()];
}

// ---- asynchronous copies ----

// Zeros from thread 8 on.
__global__ void copies(int32_t* data) {
  const Shared<int32_t> s = SharedArena().take<int32_t>(64);
  if (thread_index() < 16) {
    copy_async(s + 4 * thread_index(), data + 4 * thread_index(), thread_index() < 8);
    copy_async_commit();
    copy_async_wait<0>();
  }
  sync_threads();
  data[thread_index()] = s[thread_index()] + 1;
}

// Each thread its own two groups, of two copies and of one; then one that it leaves under way.
__global__ void copy_groups(int32_t* data) {
  const Shared<int32_t> s = SharedArena().take<int32_t>(3 * 16);
  const int t = 4 * thread_index();
  copy_async(s + t, data + t);
  copy_async(s + 16 + t, data + 16 + t);
  copy_async_commit();
  copy_async(s + 32 + t, data + 32 + t);
  copy_async_commit();
  copy_async_wait<1>();
  int32_t sum = s[t];
  sum += s[16 + t];
  copy_async_wait<0>();
  sum += s[32 + t];
  copy_async(s + t, data + t);
  data[48 + thread_index()] = sum;
}

// ---- exchange within a warp ----

__global__ void shuffles(int32_t* data) {
  const int64_t value = data[lane_index()] * (int64_t{1} << 20);
  const auto put = [&](int row, int64_t v) {
    data[row * 32 + lane_index()] = static_cast<int32_t>(v >> 20);
  };
  sync_warp();
  put(0, shuffle(value, 5));
  put(1, shuffle(value, 33 + lane_index()));  // modulo 32
  put(2, shuffle_xor(value, 6));
  put(3, shuffle_up(value, 3));
  put(4, shuffle_down(value, 3));
  put(5, warp_inclusive_scan(value));
  put(6, warp_sum(value));
  put(7, static_cast<int64_t>(any_lane(value == 0)) << 20);
}

__global__ void half_warps(int32_t* data) {
  if (lane_index() < 16) {
    data[thread_index()] = static_cast<int32_t>(ballot(lane_index() % 2 == 0, 0x0000ffffu));
    data[32 + thread_index()] = shuffle(thread_index(), 15 - lane_index(), 0x0000ffffu);
  } else {
    data[thread_index()] = static_cast<int32_t>(ballot(lane_index() % 4 == 0, 0xffff0000u) >> 16);
    data[32 + thread_index()] = shuffle(thread_index(), 16, 0xffff0000u);
  }
}

// Lanes with odd numbers have left: the others go on without them.
__global__ void after_return(int32_t* data) {
  if (lane_index() % 2 == 1) {
    return;
  }
  data[thread_index()] = shuffle_xor(thread_index(), 2, 0x55555555u);
}

__global__ void matches(int32_t* data) {
  const auto key = static_cast<uint32_t>(data[lane_index()]);
  sync_warp();
  data[lane_index()] = static_cast<int32_t>(match_any(key));
}

// ---- atomics ----

__global__ void histogram(int32_t* data) {
  const Shared<int32_t> s = SharedArena().take<int32_t>(64);
  const int32_t key = data[thread_index()];
  s[thread_index()] = 0;
  sync_threads();
  atomic_add(s + key, 1);
  sync_threads();
  data[thread_index()] = s[thread_index()];
}

__global__ void global_atomic(int32_t* data) {
  atomic_add(data + thread_index() % 2, 1 + thread_index());
}

// ---- matrices ----

// 32 rows of 8 elements: lane i names row 5 i, modulo 32. data: [32, 4] words.
template <bool kTransposed>
__global__ void matrices(int32_t* data) {
  const Shared<uint32_t> s = SharedArena().take<uint32_t, 128>(128);
  for (int i = lane_index(); i < 128; i += 32) {
    s[i] = static_cast<uint32_t>(data[i]);
  }
  sync_warp();
  const Shared<float16> row = (s + lane_index() * 5 % 32 * 4).as<float16>();
  uint32_t fragment[4];
  kTransposed ? load_matrix_x4_transposed(fragment, row) : load_matrix_x4(fragment, row);
  for (int m = 0; m < 4; ++m) {
    data[lane_index() * 4 + m] = static_cast<int32_t>(fragment[m]);
  }
}

// data: words of a [16, 8], words of b by column [8, 8], c [16, 8] in and out. T: what the words
// hold, float: one tf32.
template <typename T>
__global__ void product(int32_t* data) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  uint32_t a[4], b[2];
  float c[4];
  for (int i = 0; i < 4; ++i) {
    a[i] = static_cast<uint32_t>(data[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
  }
  for (int i = 0; i < 2; ++i) {
    b[i] = static_cast<uint32_t>(data[128 + g * 8 + t + i * 4]);
  }
  int32_t* own[4];
  for (int i = 0; i < 4; ++i) {
    own[i] = data + 192 + (g + i / 2 * 8) * 8 + 2 * t + i % 2;
    c[i] = std::bit_cast<float>(*own[i]);
  }
  if constexpr (sizeof(T) == 2) {
    mma_16x8x16<T>(c, a, b);
  } else {
    mma_16x8x8_tf32(c, a, b);
  }
  for (int i = 0; i < 4; ++i) {
    *own[i] = std::bit_cast<int32_t>(c[i]);
  }
}

// ---- numbers: kWords words, each replaced by its value under f ----

template <typename F>
__device__ void replace(int32_t* data, F&& f) {
  int32_t& word = data[block_index().x * 64 + thread_index()];
  word = static_cast<int32_t>(f(static_cast<uint32_t>(word)));
}

template <typename T>
__global__ void widen(int32_t* data) {
  replace(data, [](uint32_t bits) {
    return std::bit_cast<uint32_t>(to_float(T{static_cast<uint16_t>(bits)}));
  });
}

template <typename T>
__global__ void narrow(int32_t* data) {
  replace(data, [](uint32_t bits) { return from_float<T>(std::bit_cast<float>(bits)).bits; });
}

template <typename T>
__global__ void pack_twice(int32_t* data) {
  replace(data, [](uint32_t bits) {
    const float x = std::bit_cast<float>(bits);
    return pack<T>(x, -x);
  });
}

__global__ void exp2(int32_t* data) {
  replace(data, [](uint32_t bits) {
    return std::bit_cast<uint32_t>(fast_exp2(std::bit_cast<float>(bits)));
  });
}

// Of words that are not 0.
__global__ void count_bits(int32_t* data) {
  replace(data, [](uint32_t bits) {
    return popcount(bits) + 100 * leading_zeros(bits) + 10000 * lowest_bit(bits);
  });
}

__global__ void round_to_tf32(int32_t* data) {
  replace(data, [](uint32_t bits) { return to_tf32(std::bit_cast<float>(bits)); });
}

}  // namespace

ScratchKernels primitive_kernels() {
  const auto number = [](auto kernel) {
    return Scratch{kernel, 64, 0, {kWords / 64, 1, 1}, kWords};
  };
  return {
      {"blocks", {blocks, 33, 0, {4, 3, 2}, 24}},
      {"reverse", {reverse}},
      {"reverse_80", {reverse_80, 80, 320, {1, 1, 1}, 80}},
      {"not_written", {not_written}},
      {"no_shared_memory", {no_shared_memory, 64, 0}},
      {"small_elements", {small_elements}},
      {"named_barriers", {named_barriers, 128, 512, {1, 1, 1}, 128}},
      {"warp_barrier", {warp_barrier, 40, 160, {1, 1, 1}, 40}},
      {"copies", {copies}},
      {"copy_groups", {copy_groups, 4, 192, {2, 1, 1}, 52}},
      {"shuffles", {shuffles, 32, 0, {1, 1, 1}, 256}},
      {"half_warps", {half_warps, 32}},
      {"after_return", {after_return, 32, 0, {1, 1, 1}, 32}},
      {"matches", {matches, 32, 0, {1, 1, 1}, 32}},
      {"histogram", {histogram}},
      {"global_atomic", {global_atomic, 96, 0, {1, 1, 1}, 2}},
      {"load_matrix", {matrices<false>, 32, 512, {1, 1, 1}, 128}},
      {"load_matrix_transposed", {matrices<true>, 32, 512, {1, 1, 1}, 128}},
      {"mma_bfloat16", {product<bfloat16>, 32, 0, {1, 1, 1}, 320}},
      {"mma_float16", {product<float16>, 32, 0, {1, 1, 1}, 320}},
      {"mma_tf32", {product<float>, 32, 0, {1, 1, 1}, 320}},
      {"widen_bfloat16", number(widen<bfloat16>)},
      {"widen_float16", number(widen<float16>)},
      {"narrow_bfloat16", number(narrow<bfloat16>)},
      {"narrow_float16", number(narrow<float16>)},
      {"pack_bfloat16", number(pack_twice<bfloat16>)},
      {"pack_float16", number(pack_twice<float16>)},
      {"exp2", number(exp2)},
      {"count_bits", number(count_bits)},
      {"round_to_tf32", number(round_to_tf32)},
  };
}

}  // namespace mor
