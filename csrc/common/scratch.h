// Working memory of a CPU kernel's thread, kept between calls: fresh pages cost more than the
// arithmetic on them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace mor::MOR_ISA {

class Scratch {
 public:
  ~Scratch() { std::free(base_); }

  // Drops what was taken before and makes room for bytes more, in one piece.
  void reset(int64_t bytes) {
    used_ = 0;
    if (bytes > capacity_) {
      std::free(base_);
      capacity_ = (bytes + kAlign - 1) / kAlign * kAlign;
      base_ = static_cast<char*>(std::aligned_alloc(kAlign, static_cast<size_t>(capacity_)));
      if (base_ == nullptr) {
        capacity_ = 0;
        throw std::bad_alloc();
      }
    }
  }

  // count elements of T, uninitialised, on a cache line of their own.
  template <typename T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base_ + used_);
    used_ += bytes_for<T>(count);
    return piece;
  }

  template <typename T>
  static int64_t bytes_for(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + kAlign - 1) / kAlign * kAlign;
  }

 private:
  static constexpr int64_t kAlign = 64;
  char* base_ = nullptr;
  int64_t capacity_ = 0, used_ = 0;
};

}  // namespace mor::MOR_ISA
