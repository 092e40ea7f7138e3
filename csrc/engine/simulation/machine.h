// Runs what a scheduler plans, as mor_ext/inference/walk.py and pool.py do, on the model of
// numbers.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <unordered_set>
#include <vector>

#include "engine/scheduler.h"
#include "engine/simulation/model.h"

namespace mor::engine::simulation {

class Machine {
 public:
  // states: all that tokens may have after a depth. Everything outlives this.
  Machine(Scheduler& scheduler, const Model& model, int32_t slots,
          const std::unordered_set<State>& states);

  // After scheduler.plan(), up to finish_step. Throws std::logic_error if a row has a state that no
  // token has, because it has seen something else than the strategy's definition says.
  const Sampled& step();

  State state(int32_t slot) const { return hidden_[slot]; }

 private:
  void enter(int32_t stage);
  void pass(int32_t stage, const Pass& pass);
  void write(int32_t stage, int32_t layer, const Pass& pass);
  void append(int32_t stage, int32_t layer, const Pass& pass);
  void attend(int32_t layer, const Pass& pass);
  void check(int32_t stage, const Pass& pass) const;
  void copy(const Copies& copies, int32_t size);
  // Flags for all rows, or none if all are set and the number of rows is even.
  std::span<const bool> flags(size_t rows) const;

  Scheduler& scheduler_;
  const Model& model_;
  const std::unordered_set<State>& states_;
  std::vector<State> memory_;  // [blocks * kBlockSize]
  std::vector<State> hidden_;  // [slots]
  std::unique_ptr<bool[]> keep_;
  std::vector<State> copied_;
};

}  // namespace mor::engine::simulation
