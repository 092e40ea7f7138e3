// What must hold between steps, whatever has happened.
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine/scheduler.h"

namespace mor::engine {

void Scheduler::check() const {
  check_blocks();
  check_kept();
  size_t slots = slots_.size();
  for (const auto& [id, sequence] : sequences_) {
    for (const Unit& unit : sequence->units) {
      slots += unit.slots.size();
    }
  }
  if (slots != static_cast<size_t>(limits_.token_budget)) {
    throw std::logic_error("a slot is lost, or is there twice");
  }
}

void Scheduler::check_blocks() const {
  std::vector<int32_t> running(pool_.num_blocks(), 0), kept(pool_.num_blocks(), 0);
  const auto count = [](const Sequence& sequence, std::vector<int32_t>& users) {
    for (const Lane& lane : sequence.lanes) {
      for (const int32_t block : lane.blocks()) {
        ++users[block];
      }
    }
  };
  for (const auto& [id, sequence] : sequences_) {
    count(*sequence, running);
  }
  for (const auto& sequence : kept_.all()) {
    count(*sequence, kept);
  }
  int32_t free = 0, only_kept = 0;
  for (int32_t block = 0; block < pool_.num_blocks(); ++block) {
    const int32_t users = running[block] + kept[block];
    if (users != pool_.users(block)) {
      throw std::logic_error("block " + std::to_string(block) + " has " +
                             std::to_string(pool_.users(block)) + " users, lanes name it " +
                             std::to_string(users) + " times");
    }
    free += users == 0;
    only_kept += running[block] == 0 && kept[block] > 0;
  }
  if (free != pool_.num_free() || only_kept != pool_.num_kept()) {
    throw std::logic_error("free blocks, kept ones and used ones are not all blocks");
  }
}

void Scheduler::check_kept() const {
  for (const auto& sequence : kept_.all()) {
    const std::vector<int32_t> entries = sequence->entries_of(sequence->size(), layout_);
    for (size_t lane = 0; lane < entries.size(); ++lane) {
      if (sequence->done != sequence->size() || sequence->lanes[lane].entries() != entries[lane]) {
        throw std::logic_error("a kept sequence has entries of other tokens than its own");
      }
    }
  }
}

}  // namespace mor::engine
