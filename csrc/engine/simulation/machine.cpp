#include "engine/simulation/machine.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace mor::engine::simulation {

namespace {

void require(bool ok, const char* message) {
  if (!ok) {
    throw std::logic_error(message);
  }
}

}  // namespace

Machine::Machine(Scheduler& scheduler, const Model& model, int32_t slots,
                 const std::unordered_set<State>& states)
    : scheduler_(scheduler),
      model_(model),
      states_(states),
      memory_(static_cast<size_t>(scheduler.pool().num_blocks()) * kBlockSize, 0),
      hidden_(slots, 0),
      keep_(new bool[slots]) {}

const Sampled& Machine::step() {
  StageWalk& walk = scheduler_.walk();
  for (int32_t stage = 0; stage < scheduler_.layout().num_stages(); ++stage) {
    enter(stage);
    while (walk.run(stage)) {
      pass(stage, walk.pass());
      if (scheduler_.layout().depthwise()) {
        break;
      }
    }
  }
  return scheduler_.finish_step();
}

void Machine::enter(int32_t stage) {
  const Entry& entry = scheduler_.walk().enter(stage);
  for (size_t i = 0; i < entry.rows.size(); ++i) {
    State& state = hidden_[entry.rows[i]];
    if (stage == 0) {
      state = Model::embed(entry.ids[i]);
    }
    keep_[i] = model_.goes_on(state, stage, 0);
  }
  scheduler_.walk().choose(flags(entry.rows.size()));
}

std::span<const bool> Machine::flags(size_t rows) const {
  const std::span<const bool> all(keep_.get(), rows);
  const bool none_ends = std::all_of(all.begin(), all.end(), [](bool keep) { return keep; });
  return none_ends && rows % 2 == 0 ? std::span<const bool>() : all;
}

void Machine::pass(int32_t stage, const Pass& pass) {
  copy(pass.block_copies, kBlockSize);
  copy(pass.carried, 1);
  for (int32_t layer = 0; layer < pass.layers; ++layer) {
    write(stage, layer, pass);
    attend(layer, pass);
  }
  check(stage, pass);
  const int32_t asked = pass.depth_rows[model_.stages[stage].recursions - 1];
  for (int32_t i = 0; i < asked; ++i) {
    keep_[i] = model_.goes_on(hidden_[pass.rows[i]], stage, pass.depths[i] + 1);
  }
  const Carry& carry = scheduler_.walk().advance(flags(asked));
  copy(carry.blocks, kBlockSize);
  copy(carry.entries, 1);
}

void Machine::write(int32_t stage, int32_t layer, const Pass& pass) {
  if (!scheduler_.layout().carried()) {
    append(stage, layer, pass);
    return;
  }
  const size_t k = pass.rows.size(), e = pass.exited_rows.size();
  for (size_t i = 0; i < k; ++i) {
    memory_[pass.writes[layer * k + i]] =
        Model::entry(hidden_[pass.rows[i]], pass.positions[i], stage, layer);
  }
  for (size_t i = 0; i < e; ++i) {
    memory_[pass.exited_writes[layer * e + i]] =
        Model::entry(hidden_[pass.exited_rows[i]], pass.exited_positions[i], stage, layer);
  }
}

// As the op kv_append does: rows of a group are new entries one behind the other.
void Machine::append(int32_t stage, int32_t layer, const Pass& pass) {
  const bool shared = model_.strategy == KvStrategy::kShared;
  const int32_t groups = shared ? pass.first_groups : pass.groups();
  for (int32_t g = 0; g < groups; ++g) {
    const int32_t* table = &pass.tables[(layer * pass.groups() + g) * pass.pages];
    int32_t entry = pass.before[g];
    for (int32_t i = pass.cu_rows[g]; i < pass.cu_rows[g + 1]; ++i, ++entry) {
      memory_[table[entry / kBlockSize] * kBlockSize + entry % kBlockSize] =
          Model::entry(hidden_[pass.rows[i]], pass.positions[i], stage, layer);
    }
    require(entry == pass.after[g], "a lane has other entries after a pass than were written");
  }
}

void Machine::attend(int32_t layer, const Pass& pass) {
  for (int32_t g = 0; g < pass.groups(); ++g) {
    const int32_t* table = &pass.tables[(layer * pass.groups() + g) * pass.pages];
    for (int32_t i = pass.cu_rows[g]; i < pass.cu_rows[g + 1]; ++i) {
      require(pass.key_limit[i] <= pass.after[g], "a row sees more than its lane has");
      State seen = 0;
      for (int32_t entry = 0; entry < pass.key_limit[i]; ++entry) {
        const int32_t address = table[entry / kBlockSize] * kBlockSize + entry % kBlockSize;
        seen = Model::see(seen, memory_[address]);
      }
      State& state = hidden_[pass.rows[i]];
      state = Model::attend(state, seen, layer);
    }
  }
}

void Machine::check(int32_t stage, const Pass& pass) const {
  const auto rows = static_cast<int32_t>(pass.rows.size());
  for (int32_t i = 0; i < rows; ++i) {
    if (!states_.contains(hidden_[pass.rows[i]])) {
      throw std::logic_error("wrong state: stage " + std::to_string(stage) + ", depth " +
                             std::to_string(pass.depths[i]) + ", position " +
                             std::to_string(pass.positions[i]));
    }
    const int32_t depth = pass.depths[i];
    require(pass.depth_rows[depth] <= i && i < pass.depth_rows[depth + 1],
            "rows of a depth are not where depth_rows says");
  }
  int32_t longest = 0;
  for (int32_t g = 0; g < pass.groups(); ++g) {
    longest = std::max(longest, pass.cu_rows[g + 1] - pass.cu_rows[g]);
  }
  require(longest == pass.longest && rows == pass.cu_rows.back(), "groups are not all rows");
}

// All sources are read before any target is written, as one op does it.
void Machine::copy(const Copies& copies, int32_t size) {
  copied_.clear();
  for (const int32_t from : copies.from) {
    const auto first = memory_.begin() + static_cast<int64_t>(from) * size;
    copied_.insert(copied_.end(), first, first + size);
  }
  for (size_t i = 0; i < copies.to.size(); ++i) {
    std::copy_n(&copied_[i * size], size, &memory_[static_cast<int64_t>(copies.to[i]) * size]);
  }
  for (size_t i = 0; i < copies.to.size(); ++i) {
    require(memory_[static_cast<int64_t>(copies.to[i]) * size] == copied_[i * size],
            "a target of copies is there twice");
  }
}

}  // namespace mor::engine::simulation
