#include "engine/layout.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "engine/lane.h"

namespace mor::engine {

Layout::Layout(std::vector<Stage> stages, KvStrategy strategy, bool depthwise)
    : stages_(std::move(stages)), strategy_(strategy), depthwise_(depthwise) {
  if (stages_.empty()) {
    throw std::invalid_argument("stages must be at least one, got none");
  }
  first_lane_.push_back(0);
  for (const Stage& stage : stages_) {
    if (stage.layers < 1 || stage.recursions < 1 || stage.recursions > 255) {
      throw std::invalid_argument(
          "a stage must have at least 1 layer and 1 to 255 recursions, got " +
          std::to_string(stage.layers) + " and " + std::to_string(stage.recursions));
    }
    const int32_t depths = strategy == KvStrategy::kShared ? 1 : stage.recursions;
    lane_layers_.insert(lane_layers_.end(), depths, stage.layers);
    first_lane_.push_back(num_lanes());
  }
}

int32_t Layout::lanes_of_depth(int32_t stage, int32_t depth) const {
  switch (strategy_) {
    case KvStrategy::kRecursionWise:
      return depth;
    case KvStrategy::kShared:
      return std::min(depth, 1);
    case KvStrategy::kHybrid:
      return depth > 0 ? depths(stage) : 0;
    case KvStrategy::kFrozen:
      break;
  }
  return depths(stage);
}

int64_t Layout::most_blocks(int32_t tokens) const {
  int64_t blocks = 0;
  for (const int32_t layers : lane_layers_) {
    blocks += static_cast<int64_t>(layers) * pages_of(tokens);
  }
  return blocks;
}

}  // namespace mor::engine
