#include "simt/shared.h"

#include <cstring>

#include "simt/block.h"

namespace mor::simt {
namespace {

void note(int thread, const void* at, int64_t bytes, Access kind) {
  Block& block = current_block();
  const int64_t begin = static_cast<const char*>(at) - block.shared;
  if (std::string wrong = block.races.access(thread, begin, begin + bytes, kind); !wrong.empty()) {
    fail(wrong);
  }
}

}  // namespace

void read_shared(const void* from, int64_t bytes) {
  note(thread_index(), from, bytes, Access::kRead);
}

void read_shared_as(int thread, const void* from, int64_t bytes) {
  note(thread, from, bytes, Access::kRead);
}

void write_shared(void* to, int64_t bytes) {
  note(thread_index(), to, bytes, Access::kWrite);
}

void update_shared(void* at, int64_t bytes) {
  note(thread_index(), at, bytes, Access::kAtomic);
}

char* shared_bytes_at(int64_t begin, int64_t bytes) {
  Block& block = current_block();
  if (begin + bytes > block.launch.shared_bytes) {
    fail("the kernel takes " + std::to_string(begin + bytes) +
         " bytes of shared memory, launched with " + std::to_string(block.launch.shared_bytes));
  }
  return block.shared + begin;
}

void copy_async(void* to, const void* from, int64_t valid_bytes, int64_t bytes) {
  Block& block = current_block();
  Thread& thread = current_thread();
  if (valid_bytes > 0 && reinterpret_cast<uintptr_t>(from) % static_cast<uintptr_t>(bytes) != 0) {
    fail("copy_async from an address that is no multiple of " + std::to_string(bytes));
  }
  const int64_t begin = static_cast<char*>(to) - block.shared;
  if (std::string wrong = block.races.copy_starts(block.running, begin, begin + bytes);
      !wrong.empty()) {
    fail(wrong);
  }
  std::memset(to, 0xff, static_cast<size_t>(bytes));
  thread.copies.push_back(
      {static_cast<char*>(to), static_cast<const char*>(from), bytes, valid_bytes, thread.group});
}

void copy_async_commit() {
  ++current_thread().group;
}

void copy_async_wait(int pending) {
  Block& block = current_block();
  Thread& thread = current_thread();
  while (!thread.copies.empty() && thread.copies.front().group < thread.group - pending) {
    const Copy& copy = thread.copies.front();
    std::memset(copy.to, 0, static_cast<size_t>(copy.bytes));
    if (copy.valid_bytes > 0) {
      std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.valid_bytes));
    }
    const int64_t begin = copy.to - block.shared;
    block.races.copy_arrives(block.running, begin, begin + copy.bytes);
    thread.copies.pop_front();
  }
}

}  // namespace mor::simt
