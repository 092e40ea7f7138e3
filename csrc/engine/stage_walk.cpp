#include "engine/stage_walk.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace mor::engine {

namespace {

void check_flags(std::span<const bool> keep, size_t rows) {
  if (keep.data() != nullptr && keep.size() != rows) {
    throw std::invalid_argument("keep must be a flag for each of " + std::to_string(rows) +
                                " rows, got " + std::to_string(keep.size()));
  }
}

}  // namespace

void Pass::clear() {
  for (auto* list : {&rows, &positions, &depths, &key_limit, &depth_rows, &cu_rows, &before, &after,
                     &tables, &writes, &exited_rows, &exited_positions, &exited_writes}) {
    list->clear();
  }
  block_copies.clear();
  carried.clear();
  layers = pages = longest = first_groups = 0;
}

// ---- the entry ----

const Entry& StageWalk::enter(int32_t stage) {
  stage_ = stage;
  parts_.clear();
  for (auto* list : {&entry_.rows, &entry_.positions, &entry_.ids}) {
    list->clear();
  }
  for (Sequence* sequence : running_) {
    const auto& units = sequence->units;
    for (size_t i = 0; i < units.size(); ++i) {
      const Unit& unit = units[i];
      if (unit.stage < stage) {
        break;  // whoever comes behind it waits, though it may have skipped what this one is at
      }
      if (unit.stage != stage || unit.inside()) {
        continue;
      }
      parts_.push_back({sequence, i});
      for (int32_t t = 0; t < unit.count; ++t) {
        entry_.rows.push_back(unit.slots[t]);
        entry_.positions.push_back(unit.first + t);
        entry_.ids.push_back(sequence->tokens[unit.first + t]);
      }
    }
  }
  return entry_;
}

void StageWalk::choose(std::span<const bool> keep) {
  check_flags(keep, entry_.rows.size());
  carry_.blocks.clear();
  carry_.entries.clear();
  size_t next = 0;
  for (const Part& part : parts_) {
    Unit& unit = part.unit();
    unit.depth = 0;
    unit.listed.resize(unit.count);
    std::iota(unit.listed.begin(), unit.listed.end(), 0);
    unit.active = unit.listed;
    keep_active(unit, keep, next);
    if (layout_.strategy() != KvStrategy::kFrozen) {
      unit.listed = unit.active;
    }
    settle(part);
  }
}

// Leaves active those of the next flags that are set; without flags all.
void StageWalk::keep_active(Unit& unit, std::span<const bool> keep, size_t& next) const {
  unit.exited.clear();
  if (keep.data() == nullptr) {
    return;
  }
  const bool lists_exited = layout_.strategy() == KvStrategy::kFrozen;
  size_t kept = 0;
  for (const int32_t token : unit.active) {
    if (keep[next++]) {
      unit.active[kept++] = token;
    } else if (lists_exited) {
      unit.exited.push_back(token);
    }
  }
  unit.active.resize(kept);
}

// Lets a unit go on to the next stage if it has nothing left to do in this one.
void StageWalk::settle(const Part& part) {
  Unit& unit = part.unit();
  if (unit.depth < layout_.stage(stage_).recursions) {
    if (!unit.active.empty() || !unit.exited.empty()) {
      return;
    }
    if (layout_.carried() && !unit.listed.empty()) {
      // Its entries at deeper depths are those of this one. They stand behind those of the units
      // ahead, which may still have to be written.
      const auto ahead = part.sequence->units.begin();
      if (std::any_of(ahead, ahead + part.number,
                      [&](const Unit& other) { return other.stage == stage_; })) {
        return;
      }
      fill_deeper(*part.sequence, unit);
    }
  }
  ++unit.stage;
  unit.depth = Unit::kAtEntry;
}

void StageWalk::fill_deeper(Sequence& sequence, const Unit& unit) {
  const auto count = static_cast<int32_t>(unit.listed.size());
  const Lane& source = sequence.lanes[layout_.lane(stage_, unit.depth - 1)];
  for (int32_t depth = unit.depth; depth < layout_.depths(stage_); ++depth) {
    Lane& lane = sequence.lanes[layout_.lane(stage_, depth)];
    lane.append(pool_, count, carry_.blocks);
    for (int32_t layer = 0; layer < lane.layers(); ++layer) {
      for (int32_t entry = unit.base; entry < unit.base + count; ++entry) {
        carry_.entries.add(source.address(layer, entry), lane.address(layer, entry));
      }
    }
  }
}

// ---- the pass ----

bool StageWalk::run(int32_t stage) {
  stage_ = stage;
  parts_.clear();
  group_lanes_.clear();
  written_.clear();
  exited_.clear();
  pass_.clear();
  for (int32_t depth = 0; depth < layout_.stage(stage).recursions; ++depth) {
    pass_.depth_rows.push_back(static_cast<int32_t>(pass_.rows.size()));
    for (Sequence* sequence : running_) {
      for (size_t i = 0; i < sequence->units.size(); ++i) {
        if (sequence->units[i].stage == stage && sequence->units[i].depth == depth) {
          parts_.push_back({sequence, i});
          add(parts_.back());
        }
      }
    }
    if (depth == 0) {
      pass_.first_groups = pass_.groups();
    }
  }
  const auto rows = static_cast<int32_t>(pass_.rows.size());
  pass_.depth_rows.push_back(rows);
  pass_.cu_rows.push_back(rows);
  for (int32_t g = 0; g < pass_.groups(); ++g) {
    pass_.longest = std::max(pass_.longest, pass_.cu_rows[g + 1] - pass_.cu_rows[g]);
  }
  fill_tables();
  return !parts_.empty();
}

void StageWalk::add(const Part& part) {
  Unit& unit = part.unit();
  Lane& lane = part.sequence->lanes[layout_.lane(stage_, unit.depth)];
  const int32_t before = lane.entries();
  if (layout_.strategy() == KvStrategy::kRecursionWise) {
    unit.listed = unit.active;
    unit.base = before;
  } else if (unit.depth == 0) {
    unit.base = before;
  }
  if (layout_.strategy() != KvStrategy::kShared || unit.depth == 0) {
    lane.append(pool_, static_cast<int32_t>(unit.listed.size()), pass_.block_copies);
  }
  if (!unit.active.empty()) {
    add_to_group(lane, unit.depth, before);
    add_rows(*part.sequence, unit);
  }
  if (layout_.carried()) {
    add_carried(*part.sequence, unit, lane);
  }
}

// Units of a sequence at the same depth, one behind the other, are one group.
void StageWalk::add_to_group(const Lane& lane, int32_t depth, int32_t before) {
  const bool same =
      !group_lanes_.empty() && group_lanes_.back() == &lane && pass_.depths.back() == depth;
  if (!same) {
    group_lanes_.push_back(&lane);
    pass_.cu_rows.push_back(static_cast<int32_t>(pass_.rows.size()));
    pass_.before.push_back(before);
    pass_.after.push_back(0);
  }
  pass_.after.back() = lane.entries();
}

void StageWalk::add_rows(Sequence& sequence, const Unit& unit) {
  int32_t rank = 0;  // among the listed
  for (const int32_t token : unit.active) {
    while (unit.listed[rank] != token) {
      ++rank;
    }
    pass_.rows.push_back(unit.slots[token]);
    pass_.positions.push_back(unit.first + token);
    pass_.depths.push_back(unit.depth);
    pass_.key_limit.push_back(unit.base + rank + 1);
    const size_t row = static_cast<size_t>(unit.first + token) * layout_.num_stages();
    sequence.depth[row + stage_] = static_cast<uint8_t>(unit.depth + 1);
  }
}

// The entries of a unit come from the block, or from the states that tokens exit with, or from the
// lane of the depth before.
void StageWalk::add_carried(const Sequence& sequence, const Unit& unit, const Lane& lane) {
  auto active = unit.active.begin();
  auto exited = unit.exited.begin();
  int32_t entry = unit.base;
  for (const int32_t token : unit.listed) {
    if (active != unit.active.end() && *active == token) {
      ++active;
      written_.push_back({&lane, entry});
    } else if (exited != unit.exited.end() && *exited == token) {
      ++exited;
      exited_.push_back({&lane, entry});
      pass_.exited_rows.push_back(unit.slots[token]);
      pass_.exited_positions.push_back(unit.first + token);
    } else {
      const Lane& before = sequence.lanes[layout_.lane(stage_, unit.depth - 1)];
      for (int32_t layer = 0; layer < lane.layers(); ++layer) {
        pass_.carried.add(before.address(layer, entry), lane.address(layer, entry));
      }
    }
    ++entry;
  }
}

void StageWalk::fill_tables() {
  pass_.layers = layout_.stage(stage_).layers;
  for (const Lane* lane : group_lanes_) {
    pass_.pages = std::max(pass_.pages, lane->pages());
  }
  pass_.tables.assign(static_cast<size_t>(pass_.layers) * pass_.groups() * pass_.pages, 0);
  int32_t* out = pass_.tables.data();
  for (int32_t layer = 0; layer < pass_.layers; ++layer) {
    for (const Lane* lane : group_lanes_) {
      for (int32_t page = 0; page < lane->pages(); ++page) {
        out[page] = lane->block(page, layer);
      }
      out += pass_.pages;
    }
    for (const Place& place : written_) {
      pass_.writes.push_back(place.lane->address(layer, place.entry));
    }
    for (const Place& place : exited_) {
      pass_.exited_writes.push_back(place.lane->address(layer, place.entry));
    }
  }
}

const Carry& StageWalk::advance(std::span<const bool> keep) {
  const int32_t recursions = layout_.stage(stage_).recursions;
  check_flags(keep, pass_.depth_rows[recursions - 1]);
  carry_.blocks.clear();
  carry_.entries.clear();
  size_t next = 0;
  for (const Part& part : parts_) {
    Unit& unit = part.unit();
    if (++unit.depth < recursions) {
      keep_active(unit, keep, next);
    }
  }
  for (Sequence* sequence : running_) {  // the units ahead first
    for (size_t i = 0; i < sequence->units.size(); ++i) {
      if (sequence->units[i].stage == stage_ && sequence->units[i].inside()) {
        settle({sequence, i});
      }
    }
  }
  return carry_;
}

}  // namespace mor::engine
