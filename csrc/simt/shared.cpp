#include "simt/shared.h"

#include <algorithm>

#include "simt/block.h"

namespace mor::simt {
namespace {

int64_t byte_of(const void* at) {
  return static_cast<const char*>(at) - current->shared;
}

std::string text_of(int64_t byte) {
  std::string text = "byte " + std::to_string(byte) + " of shared memory";
  for (size_t i = 0; i < current->arrays.size(); ++i) {
    const auto [begin, count, element_bytes] = current->arrays[i];
    if (byte >= begin && byte < begin + count * element_bytes) {
      text += ", element " + std::to_string((byte - begin) / element_bytes) + " of array " +
              std::to_string(i);
    }
  }
  return text;
}

[[noreturn, gnu::noinline]] void fail_with_conflict(Site site, int thread) {
  const auto& [what, byte] = current->races.conflict();
  fail(what + ": " + text_of(byte), site, thread);
}

}  // namespace

void touch_shared(const void* at, int64_t bytes, Access access, Site site, int thread) {
  const int64_t begin = byte_of(at);
  if (!current->races.access(thread, begin, begin + bytes, access)) [[unlikely]] {
    fail_with_conflict(site, thread);
  }
}

char* take_shared(int64_t begin, int64_t count, int64_t element_bytes, Site site) {
  const SharedArray array{begin, count, element_bytes};
  if (const int64_t end = begin + count * element_bytes; end > current->launch.shared_bytes) {
    fail("the kernel takes " + std::to_string(end) +
             " bytes of shared memory and is launched with " +
             std::to_string(current->launch.shared_bytes),
         site);
  }
  if (std::ranges::find(current->arrays, array) == current->arrays.end()) {
    current->arrays.push_back(array);
  }
  return current->shared + begin;
}

void out_of_range(int64_t index, int64_t count, int64_t element_bytes, Site site) {
  fail("index " + std::to_string(index) + " of a shared array of " + std::to_string(count) +
           " elements of " + std::to_string(element_bytes) + " bytes",
       site);
}

void misaligned(const void* at, int64_t align, Site site) {
  fail("an access that must be aligned to " + std::to_string(align) +
           " bytes: " + text_of(byte_of(at)),
       site);
}

void copy_async(void* to, const void* from, bool valid, Site site) {
  if (valid && reinterpret_cast<uintptr_t>(from) % kCopyBytes != 0) {
    fail("copy_async from an address that is no multiple of " + std::to_string(kCopyBytes), site);
  }
  const int64_t begin = byte_of(to);
  touch_shared(to, kCopyBytes, Access::kWrite, site);
  current->races.copy(position.thread, begin, begin + kCopyBytes, /*arrived=*/false);
  std::memset(to, 0xff, kCopyBytes);
  Thread& thread = thread_of(position.thread);
  Copy& copy = thread.copies.emplace_back(Copy{static_cast<char*>(to), thread.group});
  if (valid) {
    std::memcpy(copy.data, from, kCopyBytes);
  }
}

void copy_async_commit() {
  ++thread_of(position.thread).group;
}

void copy_async_wait(int pending) {
  arrive_copies(thread_of(position.thread).group - pending);
}

void arrive_copies(int64_t group) {
  Thread& thread = thread_of(position.thread);
  for (auto& copies = thread.copies; thread.arrived < copies.size(); ++thread.arrived) {
    const Copy& copy = copies[thread.arrived];
    if (copy.group >= group) {
      return;
    }
    std::memcpy(copy.to, copy.data, kCopyBytes);
    const int64_t begin = byte_of(copy.to);
    current->races.copy(position.thread, begin, begin + kCopyBytes, /*arrived=*/true);
  }
  thread.copies.clear();
  thread.arrived = 0;
}

}  // namespace mor::simt
