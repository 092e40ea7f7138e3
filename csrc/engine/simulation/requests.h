// What is asked of the scheduler in an episode, and what must come of it.
#pragma once

#include <cstdint>
#include <span>
#include <unordered_set>
#include <vector>

#include "engine/scheduler.h"
#include "engine/simulation/model.h"
#include "engine/simulation/random.h"

namespace mor::engine::simulation {

struct Request {
  std::vector<int32_t> tokens;  // the prompt, and all that follow it
  int32_t prompt_size;
  int32_t priority;
  uint64_t seed;               // of its next tokens
  std::vector<State> states;   // with which the prompt's last and all later tokens leave the model
  std::vector<uint8_t> depth;  // [tokens - 1, stages]

  int32_t size() const { return static_cast<int32_t>(tokens.size()); }
  std::span<const int32_t> prompt() const {
    return {tokens.data(), static_cast<size_t>(prompt_size)};
  }
};

// The size of an episode's world.
struct World {
  Model model;
  Limits limits;
  bool depthwise;
  int32_t longest;  // tokens of a request at most

  Layout layout() const { return Layout(model.stages, model.strategy, depthwise); }
};

World random_world(Random& random, KvStrategy strategy);

// states: those that tokens have after each depth.
std::vector<Request> random_requests(Random& random, const World& world, int32_t count,
                                     std::unordered_set<State>& states);

}  // namespace mor::engine::simulation
