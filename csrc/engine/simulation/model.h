// A transformer of numbers. A state is a hash of all that went into it, so a token that has seen
// anything else than it should is found out at once, and so are all that see it.
#pragma once

#include <cstdint>
#include <unordered_set>
#include <vector>

#include "engine/layout.h"
#include "engine/simulation/random.h"

namespace mor::engine::simulation {

using State = uint64_t;  // stands for a hidden state, or for the K/V of an entry

struct Model {
  std::vector<Stage> stages;
  KvStrategy strategy;
  std::vector<int32_t> going_on;  // of 256 tokens, by stage
  int32_t vocabulary;

  static State embed(int32_t token) { return mix(1, token); }
  // The router's word before depth `depth` of a stage.
  bool goes_on(State state, int32_t stage, int32_t depth) const {
    return static_cast<int32_t>(mix(state, 256 * stage + depth) >> 56) < going_on[stage];
  }
  static State entry(State state, int32_t position, int32_t stage, int32_t layer) {
    return mix(mix(state, position), 256 * stage + layer);
  }
  // seen: of all entries, from 0, in their order.
  static State see(State seen, State entry) { return seen * 0xd1342543de82ef95 + entry; }
  static State attend(State state, State seen, int32_t layer) {
    return mix(mix(state, seen), layer);
  }
  int32_t next_token(State state, uint64_t seed) const {
    return static_cast<int32_t>(mix(state, seed) % vocabulary);
  }
};

// The states of a sequence, token by token, by the definition of the strategy (mor_ext/nn/kv.py).
class Reference {
 public:
  explicit Reference(const Model& model);

  // Adds the states after every depth to `states`; returns that with which it leaves the model.
  State append(int32_t token, std::unordered_set<State>& states);

  // [tokens, stages], how often each went through each stage.
  const std::vector<uint8_t>& depth() const { return depth_; }

 private:
  State& entry(int32_t token, int32_t stage, int32_t depth, int32_t layer) {
    return entries_[token * width_ + first_[stage] + depth * model_.stages[stage].layers + layer];
  }
  State seen(int32_t last, int32_t stage, int32_t depth, int32_t layer);

  const Model& model_;
  std::vector<int32_t> first_;  // [stages], where the entries of a token begin
  int32_t width_ = 0;           // entries of a token
  int32_t tokens_ = 0;
  std::vector<State> entries_;  // of every depth and layer; behind those depths, that of the exit
  std::vector<uint8_t> depth_;
};

}  // namespace mor::engine::simulation
