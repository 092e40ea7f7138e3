// The physical blocks of the K/V cache: who uses which. The K/V themselves are the caller's.
#pragma once

#include <cstdint>
#include <vector>

namespace mor::engine {

// Entries (tokens) of a block.
inline constexpr int32_t kBlockSize = 16;

// Blocks [0, num_blocks), each free or used by one or more lanes.
class BlockPool {
 public:
  // num_blocks: at least 0, and few enough that an entry's address fits into 31 bits.
  explicit BlockPool(int32_t num_blocks);

  int32_t num_blocks() const { return static_cast<int32_t>(users_.size()); }
  int32_t num_free() const { return static_cast<int32_t>(free_.size()); }

  // A free block, now with one user: of those there are, the one that was dropped last, whose
  // memory is most likely in a cache. Throws std::logic_error if there is none: whoever takes
  // blocks makes sure beforehand.
  int32_t take();
  // One user more, or one less, of a used block; without a user it is free.
  void share(int32_t block);
  void drop(int32_t block);

  // 0 if free.
  int32_t users(int32_t block) const;

 private:
  int32_t& used(int32_t block);

  std::vector<int32_t> users_;  // by block
  std::vector<int32_t> free_;   // a stack
};

}  // namespace mor::engine
