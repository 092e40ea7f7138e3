// The list of K/V entries of a sequence at one depth of a stage, in blocks of a pool.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/block_pool.h"

namespace mor::engine {

// Blocks, or entries, whose K/V are to be copied from `from[i]` to `to[i]`.
struct Copies {
  std::vector<int32_t> from, to;

  void add(int32_t source, int32_t target) {
    from.push_back(source);
    to.push_back(target);
  }
  void clear() {
    from.clear();
    to.clear();
  }
};

// A page is 16 entries of every layer of the stage: a block for each layer. Lanes share pages. An
// entry that is there never changes, so a shared page is copied when a lane would append to it.
//
// A lane does not know its pool; every call takes the same one.
class Lane {
 public:
  explicit Lane(int32_t layers) : layers_(layers) {}

  int32_t entries() const { return entries_; }
  int32_t layers() const { return layers_; }
  int32_t pages() const { return static_cast<int32_t>(blocks_.size()) / layers_; }
  int32_t block(int32_t page, int32_t layer) const { return blocks_[page * layers_ + layer]; }
  const std::vector<int32_t>& blocks() const { return blocks_; }

  // Where an entry is: block * kBlockSize + its place in the block.
  int32_t address(int32_t layer, int32_t entry) const {
    return block(entry / kBlockSize, layer) * kBlockSize + entry % kBlockSize;
  }

  // How many blocks append would take.
  int32_t blocks_to_append(const BlockPool& pool, int32_t count) const;
  // Makes room for count more entries. Blocks to copy before they are written are added to copies.
  void append(BlockPool& pool, int32_t count, Copies& copies);
  // A lane of the first entries of this one, in the same blocks; it runs.
  Lane prefix(BlockPool& pool, int32_t entries) const;
  // Makes it a kept one of its first entries, which nobody appends to.
  void keep(BlockPool& pool, int32_t entries);
  // Gives every block back.
  void clear(BlockPool& pool);

 private:
  // Whether the next entry goes to a page that another lane has too.
  bool appends_to_shared(const BlockPool& pool) const;

  int32_t layers_;
  int32_t entries_ = 0;
  bool kept_ = false;
  std::vector<int32_t> blocks_;  // [pages, layers]
};

// Pages of so many entries.
inline int32_t pages_of(int32_t entries) {
  return (entries + kBlockSize - 1) / kBlockSize;
}

}  // namespace mor::engine
