// The physical blocks of the K/V cache: who uses which. The K/V themselves are the caller's.
#pragma once

#include <cstdint>
#include <vector>

namespace mor::engine {

// Entries (tokens) of a block.
inline constexpr int32_t kBlockSize = 16;

// Blocks [0, num_blocks), each free or used by one or more lanes. A lane either runs, or is kept:
// it has what a finished sequence left behind, until somebody needs the room.
class BlockPool {
 public:
  // num_blocks: at least 0, and few enough that an entry's address fits into 31 bits.
  explicit BlockPool(int32_t num_blocks);

  int32_t num_blocks() const { return static_cast<int32_t>(users_.size()); }
  int32_t num_free() const { return static_cast<int32_t>(free_.size()); }
  // Used by kept lanes alone.
  int32_t num_kept() const { return num_kept_; }

  // A free block, now with one user: of those there are, the one that was dropped last, whose
  // memory is most likely in a cache. Throws std::logic_error if there is none: whoever takes
  // blocks makes sure beforehand.
  int32_t take();
  // One running user more, or one less, of a used block; without a user it is free.
  void share(int32_t block) { change(block, {.running = 1}); }
  void drop(int32_t block) { change(block, {.running = -1}); }
  // Makes a running user a kept one; one of those less.
  void keep(int32_t block) { change(block, {.running = -1, .kept = 1}); }
  void drop_kept(int32_t block) { change(block, {.kept = -1}); }

  // 0 if free.
  int32_t users(int32_t block) const { return users_.at(block).all(); }

 private:
  struct Users {
    int32_t running = 0, kept = 0;
    int32_t all() const { return running + kept; }
    bool only_kept() const { return running == 0 && kept > 0; }
  };

  // Throws std::logic_error if there are no such users.
  void change(int32_t block, Users by);

  std::vector<Users> users_;   // by block
  std::vector<int32_t> free_;  // a stack
  int32_t num_kept_ = 0;
};

}  // namespace mor::engine
