// Random requests through a scheduler, until each has what it must get or is cancelled.
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <unordered_set>
#include <vector>

#include "engine/scheduler.h"
#include "engine/simulation/machine.h"
#include "engine/simulation/requests.h"

namespace mor::engine::simulation {

class Episode {
 public:
  explicit Episode(uint64_t seed);

  // Both throw std::logic_error if anything is not as it should be.
  void run();
  // Submits and cancels from a second thread.
  void run_threaded();

  int64_t steps() const { return steps_; }
  int64_t requests() const { return static_cast<int64_t>(requests_.size()); }
  int64_t cancelled() const;  // before they had all
  const Counters& counters() const { return scheduler_.counters(); }
  std::string world() const;

 private:
  void submit(int64_t id);
  void cancel_one();
  bool step();
  void give_token(int64_t id, State state);
  void finish(int64_t id);
  void watch_first();
  void close();

  Random random_;
  World world_;
  std::unordered_set<State> states_;
  std::vector<Request> requests_;
  Scheduler scheduler_;
  Machine machine_;
  std::vector<uint8_t> cancelled_;  // by request
  std::vector<size_t> given_;       // tokens
  std::vector<int64_t> ids_;        // of those that go on after a step
  std::vector<int32_t> tokens_;     // theirs
  int64_t steps_ = 0;

  // Without a second thread: who has been submitted and not come to an end.
  std::vector<Rank> ranks_;
  std::set<Rank> alive_;
  Rank first_{};             // of them
  int64_t steps_first_ = 0;  // so long
};

}  // namespace mor::engine::simulation
