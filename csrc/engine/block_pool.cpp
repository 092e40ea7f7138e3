#include "engine/block_pool.h"

#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace mor::engine {

BlockPool::BlockPool(int32_t num_blocks) {
  constexpr int32_t most = std::numeric_limits<int32_t>::max() / kBlockSize;
  if (num_blocks < 0 || num_blocks > most) {
    throw std::invalid_argument("num_blocks must be in [0, " + std::to_string(most) + "], got " +
                                std::to_string(num_blocks));
  }
  users_.resize(num_blocks);
  free_.resize(num_blocks);
  std::iota(free_.rbegin(), free_.rend(), 0);  // block 0 is taken first
}

int32_t BlockPool::take() {
  if (free_.empty()) {
    throw std::logic_error("no block is free");
  }
  const int32_t block = free_.back();
  free_.pop_back();
  users_[block].running = 1;
  return block;
}

void BlockPool::change(int32_t block, Users by) {
  Users& users = users_.at(block);
  if (users.all() == 0) {
    throw std::logic_error("block " + std::to_string(block) + " is free");
  }
  if (users.running + by.running < 0 || users.kept + by.kept < 0) {
    throw std::logic_error("block " + std::to_string(block) + " has no such user");
  }
  num_kept_ -= users.only_kept();
  users.running += by.running;
  users.kept += by.kept;
  num_kept_ += users.only_kept();
  if (users.all() == 0) {
    free_.push_back(block);
  }
}

}  // namespace mor::engine
