// Shared memory of the running block: a checked pointer in place of a plain one, and asynchronous
// copies into it.
#pragma once

#include <cstdint>
#include <string>

#include "simt/executor.h"

namespace mor::simt {

// Notes a thread's access to bytes of shared memory; a race ends the launch.
void read_shared(const void* from, int64_t bytes);
void read_shared_as(int thread, const void* from, int64_t bytes);
void write_shared(void* to, int64_t bytes);
void update_shared(void* at, int64_t bytes);

// The bytes [begin, begin + bytes) of the block's shared memory, if the launch asked for them.
char* shared_bytes_at(int64_t begin, int64_t bytes);

// Fills the destination with 0xff (NaN in every floating dtype) and puts off the copy until its
// group is waited for; what lies past valid_bytes becomes 0.
void copy_async(void* to, const void* from, int64_t valid_bytes, int64_t bytes);
void copy_async_commit();
void copy_async_wait(int pending);

// What s[i] gives: reads and writes are noted.
template <typename T>
class Element {
 public:
  explicit Element(T* at) : at_(at) {}
  Element(const Element&) = default;

  operator T() const {  // NOLINT: implicit as a reference's value
    read_shared(at_, sizeof(T));
    return *at_;
  }
  const Element& operator=(const T& value) const {
    write_shared(at_, sizeof(T));
    *at_ = value;
    return *this;
  }
  const Element& operator=(const Element& other) const { return *this = static_cast<T>(other); }
  template <typename V>
  const Element& operator+=(const V& value) const {
    return *this = static_cast<T>(static_cast<T>(*this) + value);
  }

 private:
  T* at_;
};

template <typename T>
class Shared {
 public:
  Shared() = default;
  Shared(char* low, char* high, T* at) : low_(low), high_(high), at_(at) {}

  Element<T> operator[](int64_t i) const { return Element<T>(checked(i, sizeof(T), alignof(T))); }
  Shared operator+(int64_t offset) const { return Shared(low_, high_, at_ + offset); }

  template <typename U>
  Shared<U> as() const {
    return Shared<U>(low_, high_, reinterpret_cast<U*>(at_));
  }

  // The address of `bytes` bytes, aligned to their number.
  T* address(int64_t bytes) const { return checked(0, bytes, bytes); }

  template <typename F>
  T atomic_update(F&& f) const {
    T* at = checked(0, sizeof(T), alignof(T));
    update_shared(at, sizeof(T));
    const T old = *at;
    *at = f(old);
    return old;
  }

 private:
  T* checked(int64_t i, int64_t bytes, int64_t align) const {
    char* at = reinterpret_cast<char*>(at_) + i * static_cast<int64_t>(sizeof(T));
    if (at < low_ || at + bytes > high_) {
      fail("index " + std::to_string((at - low_) / static_cast<int64_t>(sizeof(T))) +
           " out of range of a shared array of " +
           std::to_string((high_ - low_) / static_cast<int64_t>(sizeof(T))) + " elements of " +
           std::to_string(sizeof(T)) + " bytes");
    }
    if ((at - low_) % align != 0) {
      fail("misaligned access to shared memory: byte " + std::to_string(at - low_) +
           " of an array, by " + std::to_string(align) + " bytes");
    }
    return reinterpret_cast<T*>(at);
  }

  char *low_ = nullptr, *high_ = nullptr;  // the array that the pointer is into
  T* at_ = nullptr;
};

template <typename T>
Shared<T> shared_memory(int64_t begin, int64_t count) {
  const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
  char* low = shared_bytes_at(begin, bytes);
  return Shared<T>(low, low + bytes, reinterpret_cast<T*>(low));
}

}  // namespace mor::simt
