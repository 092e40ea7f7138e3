#include "engine/lane.h"

#include <stdexcept>
#include <utility>

namespace mor::engine {

bool Lane::appends_to_shared(const BlockPool& pool) const {
  return entries_ % kBlockSize != 0 && pool.users(blocks_.back()) > 1;
}

int32_t Lane::blocks_to_append(const BlockPool& pool, int32_t count) const {
  if (count == 0) {
    return 0;
  }
  const int32_t copied = appends_to_shared(pool) ? 1 : 0;
  return layers_ * (pages_of(entries_ + count) - pages() + copied);
}

void Lane::append(BlockPool& pool, int32_t count, Copies& copies) {
  if (count == 0) {
    return;
  }
  if (appends_to_shared(pool)) {
    for (auto block = blocks_.end() - layers_; block != blocks_.end(); ++block) {
      const int32_t own = pool.take();
      copies.add(*block, own);
      pool.drop(*block);
      *block = own;
    }
  }
  entries_ += count;
  while (pages() < pages_of(entries_)) {
    for (int32_t layer = 0; layer < layers_; ++layer) {
      blocks_.push_back(pool.take());
    }
  }
}

Lane Lane::prefix(BlockPool& pool, int32_t entries) const {
  if (entries < 0 || entries > entries_) {
    throw std::invalid_argument("a prefix must be within the lane");
  }
  Lane lane(layers_);
  lane.entries_ = entries;
  lane.blocks_.assign(blocks_.begin(), blocks_.begin() + pages_of(entries) * layers_);
  for (const int32_t block : lane.blocks_) {
    pool.share(block);
  }
  return lane;
}

void Lane::keep(BlockPool& pool, int32_t entries) {
  Lane kept = prefix(pool, entries);
  clear(pool);
  *this = std::move(kept);
  for (const int32_t block : blocks_) {
    pool.keep(block);
  }
  kept_ = true;
}

void Lane::clear(BlockPool& pool) {
  for (const int32_t block : blocks_) {
    kept_ ? pool.drop_kept(block) : pool.drop(block);
  }
  blocks_.clear();
  entries_ = 0;
  kept_ = false;
}

}  // namespace mor::engine
