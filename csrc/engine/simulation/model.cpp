#include "engine/simulation/model.h"

#include <algorithm>

namespace mor::engine::simulation {

Reference::Reference(const Model& model) : model_(model) {
  for (const Stage& stage : model.stages) {
    first_.push_back(width_);
    width_ += (stage.recursions + 1) * stage.layers;
  }
}

State Reference::append(int32_t token, std::unordered_set<State>& states) {
  const auto num_stages = static_cast<int32_t>(model_.stages.size());
  const int32_t position = tokens_++;
  entries_.resize(static_cast<size_t>(tokens_) * width_);
  depth_.resize(static_cast<size_t>(tokens_) * num_stages, 0);
  State state = Model::embed(token);
  for (int32_t stage = 0; stage < num_stages; ++stage) {
    const auto [layers, recursions] = model_.stages[stage];
    uint8_t& depth = depth_[position * num_stages + stage];
    while (depth < recursions && model_.goes_on(state, stage, depth)) {
      ++depth;
      for (int32_t layer = 0; layer < layers; ++layer) {
        entry(position, stage, depth - 1, layer) = Model::entry(state, position, stage, layer);
        state = Model::attend(state, seen(position, stage, depth - 1, layer), layer);
      }
      states.insert(state);
    }
    for (int32_t layer = 0; layer < layers; ++layer) {
      entry(position, stage, recursions, layer) = Model::entry(state, position, stage, layer);
    }
  }
  return state;
}

State Reference::seen(int32_t last, int32_t stage, int32_t depth, int32_t layer) {
  const auto num_stages = static_cast<int32_t>(model_.stages.size());
  const int32_t exit = model_.stages[stage].recursions;
  State seen = 0;
  for (int32_t token = 0; token <= last; ++token) {
    const int32_t reached = depth_[token * num_stages + stage];
    int32_t from = -1;
    switch (model_.strategy) {
      case KvStrategy::kRecursionWise:
        from = reached > depth ? depth : -1;
        break;
      case KvStrategy::kShared:
        from = reached > 0 ? 0 : -1;
        break;
      case KvStrategy::kHybrid:
        from = std::min(reached - 1, depth);
        break;
      case KvStrategy::kFrozen:
        from = reached > depth ? depth : exit;
        break;
    }
    if (from >= 0) {
      seen = Model::see(seen, entry(token, stage, from, layer));
    }
  }
  return seen;
}

}  // namespace mor::engine::simulation
