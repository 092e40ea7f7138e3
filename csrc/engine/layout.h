// What the scheduler knows of a model: its stages, and which lanes a token has entries in.
#pragma once

#include <cstdint>
#include <vector>

namespace mor::engine {

// mor_ext/nn/kv.py says what they are.
enum class KvStrategy { kRecursionWise, kShared, kHybrid, kFrozen };

struct Stage {
  int32_t layers, recursions;
};

class Layout {
 public:
  // depthwise: in a step a unit of work goes through one depth of a stage, and those at other
  // depths go with it; else it goes through all its depths of the stage in one step.
  // Throws std::invalid_argument.
  Layout(std::vector<Stage> stages, KvStrategy strategy, bool depthwise);

  int32_t num_stages() const { return static_cast<int32_t>(stages_.size()); }
  const Stage& stage(int32_t s) const { return stages_[s]; }
  KvStrategy strategy() const { return strategy_; }
  bool depthwise() const { return depthwise_; }
  // Every listed token has an entry in the lanes of all depths.
  bool carried() const {
    return strategy_ == KvStrategy::kHybrid || strategy_ == KvStrategy::kFrozen;
  }

  int32_t num_lanes() const { return static_cast<int32_t>(lane_layers_.size()); }
  // The lane that depth `depth` (from 0) of a stage reads.
  int32_t lane(int32_t stage, int32_t depth) const {
    return first_lane_[stage] + (strategy_ == KvStrategy::kShared ? 0 : depth);
  }
  int32_t lane_layers(int32_t lane) const { return lane_layers_[lane]; }
  // Lanes of a stage.
  int32_t depths(int32_t stage) const { return first_lane_[stage + 1] - first_lane_[stage]; }

  // In how many lanes of a stage, from the first, a token has an entry that went to `depth` there.
  int32_t lanes_of_depth(int32_t stage, int32_t depth) const;

  // Blocks that so many tokens take at most.
  int64_t most_blocks(int32_t tokens) const;

 private:
  std::vector<Stage> stages_;
  KvStrategy strategy_;
  bool depthwise_;
  std::vector<int32_t> first_lane_;   // [stages + 1]
  std::vector<int32_t> lane_layers_;  // [lanes]
};

}  // namespace mor::engine
