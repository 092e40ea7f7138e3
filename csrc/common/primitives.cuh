// What kernels use beyond plain C++: the only file with PTX and CUDA intrinsics. Each primitive has
// a device body, and a host body for csrc/simt, which runs the same kernels on the CPU.
//
// A warp primitive is for all 32 lanes unless it takes a mask; every lane that the mask names must
// reach it. Shared memory is reached through Shared<T> alone, which is a plain pointer on a device
// and checked on the host. There `auto v = s[i]` would keep a reference: name the type instead.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/types.h"

#if defined(MOR_SIMT)
#include <cmath>
#include <cstring>
#include <source_location>

#include "simt/shared.h"
#include "simt/warp.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define MOR_PRIMITIVE inline
#else
#define MOR_PRIMITIVE __device__ __forceinline__
#endif

namespace mor {

inline constexpr int kWarpSize = 32;
inline constexpr uint32_t kAllLanes = 0xffffffffu;

// ---- where a thread is ----

#if defined(MOR_SIMT)
using simt::Shared;
using simt::Site;  // where a primitive is called, for messages
#else
struct Site {
  MOR_PRIMITIVE static constexpr Site current() { return {}; }
};

// A pointer into the block's shared memory.
template <typename T>
class Shared {
 public:
  Shared() = default;
  MOR_PRIMITIVE explicit Shared(T* pointer) : pointer_(pointer) {}
  MOR_PRIMITIVE T& operator[](int64_t i) const { return pointer_[i]; }
  MOR_PRIMITIVE Shared operator+(int64_t offset) const { return Shared(pointer_ + offset); }
  template <typename U>
  MOR_PRIMITIVE Shared<U> as() const {
    return Shared<U>(reinterpret_cast<U*>(pointer_));
  }
  MOR_PRIMITIVE T* get() const { return pointer_; }

 private:
  T* pointer_;
};
#endif

struct Index3 {
  uint32_t x, y, z;
};

// The thread's number in its (one-dimensional) block.
MOR_PRIMITIVE int thread_index() {
#if defined(MOR_SIMT)
  return simt::thread_index();
#else
  return static_cast<int>(threadIdx.x);
#endif
}

MOR_PRIMITIVE int block_size() {
#if defined(MOR_SIMT)
  return simt::block_size();
#else
  return static_cast<int>(blockDim.x);
#endif
}

MOR_PRIMITIVE Index3 block_index() {
#if defined(MOR_SIMT)
  const simt::Dim block = simt::block_index();
  return {block.x, block.y, block.z};
#else
  return {blockIdx.x, blockIdx.y, blockIdx.z};
#endif
}

MOR_PRIMITIVE Index3 grid_size() {
#if defined(MOR_SIMT)
  const simt::Dim grid = simt::grid_size();
  return {grid.x, grid.y, grid.z};
#else
  return {gridDim.x, gridDim.y, gridDim.z};
#endif
}

MOR_PRIMITIVE int lane_index() {
  return static_cast<int>(static_cast<uint32_t>(thread_index()) % kWarpSize);
}

// ---- shared memory ----

// Hands out a block's dynamic shared memory, piece after piece, each 16-byte aligned (128-byte
// aligned for what ldmatrix or a swizzle reads: give the alignment). Every thread of a block takes
// the same pieces. The host sizes the launch by adding up bytes() of the same pieces.
class SharedArena {
 public:
  template <typename T, int kAlign = 16>
  MOR_PRIMITIVE Shared<T> take(int64_t count, Site site = Site::current()) {
    offset_ = (offset_ + kAlign - 1) / kAlign * kAlign;
    const int64_t begin = offset_;
    offset_ += count * static_cast<int64_t>(sizeof(T));
#if defined(MOR_SIMT)
    return simt::shared_memory<T>(begin, count, site);
#else
    extern __shared__ __align__(128) unsigned char mor_shared_memory[];
    return Shared<T>(reinterpret_cast<T*>(mor_shared_memory + begin));
#endif
  }

 private:
  int64_t offset_ = 0;
};

// The bytes that a piece takes at most, with its alignment, for the host side.
template <typename T, int kAlign = 16>
constexpr int64_t shared_bytes(int64_t count) {
  return (count * static_cast<int64_t>(sizeof(T)) + kAlign - 1) / kAlign * kAlign;
}

// ---- synchronisation ----

// The block's barrier.
MOR_PRIMITIVE void sync_threads(Site site = Site::current()) {
#if defined(MOR_SIMT)
  simt::sync_threads(site);
#else
  __syncthreads();
#endif
}

// Barrier `id` in [1, 16) for `threads` threads, whole warps.
MOR_PRIMITIVE void sync_named(int id, int threads, Site site = Site::current()) {
#if defined(MOR_SIMT)
  simt::sync_named(id, threads, /*wait=*/true, site);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// As sync_named, but does not wait for the others.
MOR_PRIMITIVE void arrive_named(int id, int threads, Site site = Site::current()) {
#if defined(MOR_SIMT)
  simt::sync_named(id, threads, /*wait=*/false, site);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// Orders the memory accesses of a warp's lanes.
MOR_PRIMITIVE void sync_warp(uint32_t mask = kAllLanes, Site site = Site::current()) {
#if defined(MOR_SIMT)
  simt::sync_warp(mask, site);
#else
  __syncwarp(mask);
#endif
}

// Makes this thread's writes to global memory visible to other blocks before its later ones.
MOR_PRIMITIVE void thread_fence() {
#if defined(MOR_SIMT)
  std::atomic_thread_fence(std::memory_order_seq_cst);
#else
  __threadfence();
#endif
}

// ---- warp exchange: values of 4 or 8 bytes ----

template <typename T>
MOR_PRIMITIVE T shuffle(T value, int lane, uint32_t mask = kAllLanes, Site site = Site::current()) {
#if defined(MOR_SIMT)
  return simt::exchange(value, mask, "shuffle", site, [=](int) { return lane; });
#else
  return __shfl_sync(mask, value, lane);
#endif
}

template <typename T>
MOR_PRIMITIVE T shuffle_xor(T value, int bits, uint32_t mask = kAllLanes,
                            Site site = Site::current()) {
#if defined(MOR_SIMT)
  return simt::exchange(value, mask, "shuffle_xor", site, [=](int own) { return own ^ bits; });
#else
  return __shfl_xor_sync(mask, value, bits);
#endif
}

// The value `delta` lanes below; the lowest lanes get their own.
template <typename T>
MOR_PRIMITIVE T shuffle_up(T value, int delta, uint32_t mask = kAllLanes,
                           Site site = Site::current()) {
#if defined(MOR_SIMT)
  return simt::exchange(value, mask, "shuffle_up", site,
                        [=](int own) { return own < delta ? own : own - delta; });
#else
  return __shfl_up_sync(mask, value, delta);
#endif
}

// The value `delta` lanes above; the highest lanes get their own.
template <typename T>
MOR_PRIMITIVE T shuffle_down(T value, int delta, uint32_t mask = kAllLanes,
                             Site site = Site::current()) {
#if defined(MOR_SIMT)
  return simt::exchange(value, mask, "shuffle_down", site,
                        [=](int own) { return own + delta < kWarpSize ? own + delta : own; });
#else
  return __shfl_down_sync(mask, value, delta);
#endif
}

// The lanes where the predicate holds.
MOR_PRIMITIVE uint32_t ballot(bool predicate, uint32_t mask = kAllLanes,
                              Site site = Site::current()) {
#if defined(MOR_SIMT)
  return simt::ballot(predicate, mask, site);
#else
  return __ballot_sync(mask, predicate);
#endif
}

MOR_PRIMITIVE bool any_lane(bool predicate, uint32_t mask = kAllLanes,
                            Site site = Site::current()) {
  return ballot(predicate, mask, site) != 0;
}

// The lanes that hold the same value.
MOR_PRIMITIVE uint32_t match_any(uint32_t value, uint32_t mask = kAllLanes,
                                 Site site = Site::current()) {
#if defined(MOR_SIMT)
  return simt::match_any(value, mask, site);
#else
  return __match_any_sync(mask, value);
#endif
}

// f over all lanes, in every lane; f is associative and commutative.
template <typename T, typename F>
MOR_PRIMITIVE T warp_reduce(T value, F&& f, Site site = Site::current()) {
#pragma unroll
  for (int bits = kWarpSize / 2; bits > 0; bits /= 2) {
    value = f(value, shuffle_xor(value, bits, kAllLanes, site));
  }
  return value;
}

template <typename T>
MOR_PRIMITIVE T warp_sum(T value, Site site = Site::current()) {
  return warp_reduce(value, [](T a, T b) { return a + b; }, site);
}

// The sum over this lane and those below it.
template <typename T>
MOR_PRIMITIVE T warp_inclusive_scan(T value, Site site = Site::current()) {
#pragma unroll
  for (int delta = 1; delta < kWarpSize; delta *= 2) {
    const T below = shuffle_up(value, delta, kAllLanes, site);
    value += lane_index() >= delta ? below : T{0};
  }
  return value;
}

// ---- integers ----

MOR_PRIMITIVE int popcount(uint32_t x) {
#if defined(MOR_SIMT)
  return std::popcount(x);
#else
  return __popc(x);
#endif
}

// The number of zeros above the highest one; 32 for 0.
MOR_PRIMITIVE int leading_zeros(uint32_t x) {
#if defined(MOR_SIMT)
  return std::countl_zero(x);
#else
  return __clz(static_cast<int>(x));
#endif
}

// The position of the lowest one; x is not 0.
MOR_PRIMITIVE int lowest_bit(uint32_t x) {
#if defined(MOR_SIMT)
  return std::countr_zero(x);
#else
  return __ffs(static_cast<int>(x)) - 1;
#endif
}

// ---- atomics: each returns the old value; int32_t or uint32_t ----

template <typename T>
MOR_PRIMITIVE T atomic_add(T* global, T value) {
#if defined(MOR_SIMT)
  return std::atomic_ref<T>(*global).fetch_add(value);
#else
  return atomicAdd(global, value);
#endif
}

template <typename T>
MOR_PRIMITIVE T atomic_add(Shared<T> shared, T value, Site site = Site::current()) {
#if defined(MOR_SIMT)
  return shared.atomic_update([=](T old) { return old + value; }, site);
#else
  return atomicAdd(shared.get(), value);
#endif
}

// A read that sees what another block wrote before its store_release of the value read.
template <typename T>
MOR_PRIMITIVE T load_acquire(const T* global) {
#if defined(MOR_SIMT)
  return std::atomic_ref<T>(*const_cast<T*>(global)).load(std::memory_order_acquire);
#else
  T value;
  if constexpr (sizeof(T) == 8) {
    asm volatile("ld.acquire.gpu.global.b64 %0, [%1];" : "=l"(value) : "l"(global) : "memory");
  } else {
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(global) : "memory");
  }
  return value;
#endif
}

template <typename T>
MOR_PRIMITIVE void store_release(T* global, T value) {
#if defined(MOR_SIMT)
  std::atomic_ref<T>(*global).store(value, std::memory_order_release);
#else
  if constexpr (sizeof(T) == 8) {
    asm volatile("st.release.gpu.global.b64 [%0], %1;" ::"l"(global), "l"(value) : "memory");
  } else {
    asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(global), "r"(value) : "memory");
  }
#endif
}

// In a loop that waits for another block or thread.
MOR_PRIMITIVE void spin_pause() {
#if defined(MOR_SIMT)
  simt::yield();
#else
  __nanosleep(32);
#endif
}

// ---- vectors of a row ----

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T data[kCount];
  MOR_PRIMITIVE T& operator[](int i) { return data[i]; }
  MOR_PRIMITIVE const T& operator[](int i) const { return data[i]; }
};

// How many elements of T one 16-byte access moves.
template <typename T>
inline constexpr int kVector16 = 16 / static_cast<int>(sizeof(T));

// ---- numbers ----

MOR_PRIMITIVE float to_float(float x) {
  return x;
}

MOR_PRIMITIVE float to_float(bfloat16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

MOR_PRIMITIVE float to_float(float16 x) {
#if defined(MOR_SIMT)
  return simt::half_to_float(x.bits);
#else
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#endif
}

// Rounds to nearest even.
template <typename T>
MOR_PRIMITIVE T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    T value;
#if defined(MOR_SIMT)
    value.bits = std::is_same_v<T, bfloat16> ? simt::float_to_bfloat(x) : simt::float_to_half(x);
#else
    if constexpr (std::is_same_v<T, bfloat16>) {
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(value.bits) : "f"(x));
    } else {
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(value.bits) : "f"(x));
    }
#endif
    return value;
  }
}

// Two elements in one register, low in the lower half.
template <typename T>
MOR_PRIMITIVE uint32_t pack(float low, float high) {
  static_assert(sizeof(T) == 2);
#if defined(MOR_SIMT)
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
#else
  uint32_t value;
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(value) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(value) : "f"(high), "f"(low));
  }
  return value;
#endif
}

// x rounded to tf32 (10 bits of mantissa), as the bits of a float.
MOR_PRIMITIVE uint32_t to_tf32(float x) {
#if defined(MOR_SIMT)
  return simt::float_to_tf32(x);
#else
  uint32_t value;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(value) : "f"(x));
  return value;
#endif
}

// 2^x within 2^-22, denormal results flushed to 0; 0 for -inf.
MOR_PRIMITIVE float fast_exp2(float x) {
#if defined(MOR_SIMT)
  const float value = std::exp2(x);
  return value < std::numeric_limits<float>::min() ? 0.0f : value;
#else
  float value;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
#endif
}

// ---- asynchronous copies to shared memory ----

// Starts a copy of 16 bytes; fills with zeros, and does not read, where valid is false. Both
// addresses are multiples of 16 bytes.
template <typename T>
MOR_PRIMITIVE void copy_async(Shared<T> to, const T* from, bool valid = true,
                              Site site = Site::current()) {
#if defined(MOR_SIMT)
  simt::copy_async(to.checked(16, 16, site), from, valid, site);
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to.get()));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
#endif
}

// Ends a group of copies of this thread.
MOR_PRIMITIVE void copy_async_commit() {
#if defined(MOR_SIMT)
  simt::copy_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all but the latest kPending groups of this thread are there. Other threads see them
// after a barrier.
template <int kPending>
MOR_PRIMITIVE void copy_async_wait() {
#if defined(MOR_SIMT)
  simt::copy_async_wait(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// ---- matrices, PTX ISA "Matrix fragments for mma" ----
// With g = lane / 4 and t = lane % 4. 16-bit A [16, 16]: a[0] holds (g, 2t), (g, 2t + 1), a[1] the
// same of row g + 8, a[2] and a[3] those of columns + 8. B [16, 8]: b[0] holds (2t, g), (2t + 1,
// g), b[1] those of rows + 8. C [16, 8]: c[0], c[1] are (g, 2t), (g, 2t + 1), c[2], c[3] of row g
// + 8. tf32 A [16, 8]: a[0] (g, t), a[1] (g + 8, t), a[2] (g, t + 4), a[3] (g + 8, t + 4); B [8,
// 8]: b[0] (t, g), b[1] (t + 4, g).

// Four 8 x 8 matrices of 16-bit elements: lane i gives the address of row i % 8 of matrix i / 8 (16
// bytes, aligned), and gets in fragment[m] elements (g, 2t), (g, 2t + 1) of matrix m.
template <typename T>
MOR_PRIMITIVE void load_matrix_x4(uint32_t (&fragment)[4], Shared<T> row,
                                  Site site = Site::current()) {
#if defined(MOR_SIMT)
  simt::load_matrix_x4(fragment, row.checked(16, 16, site), /*transposed=*/false, site);
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row.get()));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(address)
               : "memory");
#endif
}

// The same of the transposed matrices: elements (2t, g), (2t + 1, g).
template <typename T>
MOR_PRIMITIVE void load_matrix_x4_transposed(uint32_t (&fragment)[4], Shared<T> row,
                                             Site site = Site::current()) {
#if defined(MOR_SIMT)
  simt::load_matrix_x4(fragment, row.checked(16, 16, site), /*transposed=*/true, site);
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row.get()));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(address)
               : "memory");
#endif
}

// c += a b with a [16, 16] and b [16, 8] of T, bfloat16 or float16, accumulated in fp32.
template <typename T>
MOR_PRIMITIVE void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                               Site site = Site::current()) {
#if defined(MOR_SIMT)
  simt::mma_16x8x16(c, a, b, std::is_same_v<T, bfloat16>, site);
#else
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// c += a b with a [16, 8] and b [8, 8] of tf32, accumulated in fp32.
MOR_PRIMITIVE void mma_16x8x8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                   Site site = Site::current()) {
#if defined(MOR_SIMT)
  simt::mma_16x8x8_tf32(c, a, b, site);
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

}  // namespace mor
