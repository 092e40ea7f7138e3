// Shared memory of the running block: a checked pointer in place of a plain one, and asynchronous
// copies into it.
#pragma once

#include <concepts>
#include <cstdint>
#include <cstring>

#include "simt/executor.h"
#include "simt/race.h"

namespace mor::simt {

// Notes an access of a thread to bytes of shared memory; a race ends the launch.
void touch_shared(const void* at, int64_t bytes, Access access, Site site,
                  int thread = thread_index());

// An array that the kernel takes at this byte of its shared memory.
char* take_shared(int64_t begin, int64_t count, int64_t element_bytes, Site site);

[[noreturn]] void out_of_range(int64_t index, int64_t count, int64_t element_bytes, Site site);
[[noreturn]] void misaligned(const void* at, int64_t align, Site site);

// Fills the destination, 16 bytes, with 0xff (NaN in every floating dtype) until its group is
// waited for.
void copy_async(void* to, const void* from, bool valid, Site site);
void copy_async_commit();
void copy_async_wait(int pending);

// What s[i] gives: reads and writes are noted.
template <typename T>
class Element {
  static_assert(sizeof(T) % kPiece == 0, "two of these would look like one to the race detector");

 public:
  Element(char* at, Site site) : at_(at), site_(site) {}
  Element(const Element&) = default;

  operator T() const {  // NOLINT: implicit as a reference's value
    touch_shared(at_, sizeof(T), Access::kRead, site_);
    T value;
    std::memcpy(&value, at_, sizeof(T));
    return value;
  }
  const Element& operator=(const T& value) const {
    touch_shared(at_, sizeof(T), Access::kWrite, site_);
    std::memcpy(at_, &value, sizeof(T));
    return *this;
  }
  const Element& operator=(const Element& other) const { return *this = static_cast<T>(other); }
  template <typename V>
  const Element& operator+=(const V& value) const {
    return *this = static_cast<T>(static_cast<T>(*this) + value);
  }

 private:
  char* at_;
  Site site_;
};

// An index, and where it is used.
struct Index {
  template <std::convertible_to<int64_t> I>
  Index(I i, Site site = Site::current()) : i(static_cast<int64_t>(i)), site(site) {}
  int64_t i;
  Site site;
};

template <typename T>
class Shared {
 public:
  Shared() = default;
  Shared(char* array, int64_t bytes, int64_t offset = 0)
      : array_(array), bytes_(bytes), offset_(offset) {}

  Element<T> operator[](Index index) const {
    return {(*this + index.i).checked(sizeof(T), alignof(T), index.site), index.site};
  }
  // Any i, without undefined overflow: what matters is what is accessed.
  Shared operator+(int64_t i) const {
    const uint64_t distance = static_cast<uint64_t>(i) * sizeof(T);
    return {array_, bytes_, static_cast<int64_t>(static_cast<uint64_t>(offset_) + distance)};
  }

  template <typename U>
  Shared<U> as() const {
    return {array_, bytes_, offset_};
  }

  // The address of so many bytes, all within the array.
  char* checked(int64_t bytes, int64_t align, Site site) const {
    if (offset_ < 0 || offset_ > bytes_ - bytes) [[unlikely]] {
      out_of_range(offset_ / kElement, bytes_ / kElement, kElement, site);
    }
    char* at = array_ + offset_;
    if (reinterpret_cast<uintptr_t>(at) % static_cast<uintptr_t>(align) != 0) [[unlikely]] {
      misaligned(at, align, site);
    }
    return at;
  }

  template <typename F>
  T atomic_update(F&& f, Site site) const {
    char* at = checked(kElement, alignof(T), site);
    touch_shared(at, kElement, Access::kAtomic, site);
    T old;
    std::memcpy(&old, at, sizeof(T));
    const T updated = f(old);
    std::memcpy(at, &updated, sizeof(T));
    return old;
  }

 private:
  static constexpr int64_t kElement = sizeof(T);

  char* array_ = nullptr;
  int64_t bytes_ = 0, offset_ = 0;
};

template <typename T>
Shared<T> shared_memory(int64_t begin, int64_t count, Site site) {
  return {take_shared(begin, count, sizeof(T), site), count * static_cast<int64_t>(sizeof(T))};
}

}  // namespace mor::simt
