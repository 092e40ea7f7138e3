// Finished sequences whose K/V stay in the pool, for those that begin alike.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "engine/block_pool.h"
#include "engine/layout.h"
#include "engine/sequence.h"

namespace mor::engine {

// None of them begins with all that another has.
class KeptSequences {
 public:
  // Whoever looks for a common prefix goes over all: so many take some 10 us, a step takes longer.
  static constexpr size_t kMost = 1024;

  // Both outlive this.
  KeptSequences(const Layout& layout, BlockPool& pool) : layout_(layout), pool_(pool) {}

  // The one that was used least recently first.
  std::span<const std::unique_ptr<Sequence>> all() const { return sequences_; }

  // Of a sequence that has done at least a token, whose slots have been taken back.
  void add(std::unique_ptr<Sequence> sequence);
  // Makes one of them the most recent; others are passed over.
  void touch(const Sequence& sequence);
  // Gives up the least recent one; false if there is none.
  bool evict();

 private:
  const Layout& layout_;
  BlockPool& pool_;
  std::vector<std::unique_ptr<Sequence>> sequences_;
};

}  // namespace mor::engine
