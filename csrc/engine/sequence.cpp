#include "engine/sequence.h"

#include <algorithm>

namespace mor::engine {

Sequence::Sequence(Rank rank, std::span<const int32_t> prompt, const Layout& layout)
    : rank(rank),
      tokens(prompt.begin(), prompt.end()),
      depth(prompt.size() * layout.num_stages(), 0) {
  for (int32_t lane = 0; lane < layout.num_lanes(); ++lane) {
    lanes.emplace_back(layout.lane_layers(lane));
  }
}

void Sequence::append(int32_t token, const Layout& layout) {
  tokens.push_back(token);
  depth.resize(tokens.size() * layout.num_stages(), 0);
}

namespace {

// Adds what a unit may append to each lane until it leaves the last stage or the step ends.
void add_entries(const Layout& layout, const Unit& unit, std::vector<int32_t>& entries) {
  for (int32_t s = unit.stage; s < layout.num_stages(); ++s) {
    const bool inside = s == unit.stage && unit.inside();
    const int32_t from = inside ? unit.depth : 0;
    size_t tokens = unit.count;
    if (inside) {
      tokens = layout.carried() ? unit.listed.size() : unit.active.size();
    }
    // An exit fills the lanes of all deeper depths at once, where every depth lists it.
    const bool one_depth = layout.depthwise() && !layout.carried();
    const int32_t to = one_depth ? std::min(from + 1, layout.depths(s)) : layout.depths(s);
    for (int32_t depth = from; depth < to; ++depth) {
      entries[layout.lane(s, depth)] += static_cast<int32_t>(tokens);
    }
  }
}

}  // namespace

int32_t Sequence::blocks_for_step(const Layout& layout, const BlockPool& pool,
                                  int32_t begin) const {
  std::vector<int32_t> entries(lanes.size(), 0);
  for (const Unit& unit : units) {
    add_entries(layout, unit, entries);
  }
  if (begin > 0) {
    add_entries(layout, Unit{.first = entered, .count = begin, .slots = {}}, entries);
  }
  int32_t blocks = 0;
  for (size_t lane = 0; lane < lanes.size(); ++lane) {
    blocks += lanes[lane].blocks_to_append(pool, entries[lane]);
  }
  return blocks;
}

std::vector<int32_t> Sequence::entries_of(int32_t count, const Layout& layout) const {
  std::vector<int32_t> entries(lanes.size(), 0);
  const int32_t stages = layout.num_stages();
  for (int32_t i = 0; i < count * stages; ++i) {
    const int32_t stage = i % stages;
    const int32_t in = layout.lanes_of_depth(stage, depth[i]);
    for (int32_t d = 0; d < in; ++d) {
      ++entries[layout.lane(stage, d)];
    }
  }
  return entries;
}

void Sequence::share_prefix(const Sequence& parent, int32_t count, const Layout& layout,
                            BlockPool& pool) {
  std::copy_n(parent.depth.begin(), static_cast<size_t>(count) * layout.num_stages(),
              depth.begin());
  const std::vector<int32_t> entries = parent.entries_of(count, layout);
  for (size_t lane = 0; lane < lanes.size(); ++lane) {
    lanes[lane] = parent.lanes[lane].prefix(pool, entries[lane]);
  }
  entered = done = count;
}

void Sequence::keep(const Layout& layout, BlockPool& pool) {
  units.clear();
  tokens.resize(done);
  depth.resize(static_cast<size_t>(done) * layout.num_stages());
  const std::vector<int32_t> entries = entries_of(done, layout);
  for (size_t lane = 0; lane < lanes.size(); ++lane) {
    lanes[lane].keep(pool, entries[lane]);
  }
}

void Sequence::restart(BlockPool& pool) {
  for (Lane& lane : lanes) {
    lane.clear(pool);
  }
  units.clear();
  entered = done = entering = reserved = 0;
}

}  // namespace mor::engine
