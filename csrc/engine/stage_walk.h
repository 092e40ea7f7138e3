// One stage of a step after the other: who enters it, who goes through its block and where the K/V
// of each are, who leaves.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/block_pool.h"
#include "engine/layout.h"
#include "engine/sequence.h"

namespace mor::engine {

// Tokens at the entry of a stage.
struct Entry {
  std::vector<int32_t> rows;       // [n], their slots
  std::vector<int32_t> positions;  // [n], in their sequences
  std::vector<int32_t> ids;        // [n], the tokens
};

// What goes through a stage's block at once, of all depths, the first depth first.
//
// A group is what a lane's queries come from: rows of one sequence at one depth. Addresses of
// entries are those of Lane::address.
struct Pass {
  std::vector<int32_t> rows;        // [k], slots of the active tokens
  std::vector<int32_t> positions;   // [k]
  std::vector<int32_t> depths;      // [k], from 0
  std::vector<int32_t> key_limit;   // [k], entries of its lane that a row sees
  std::vector<int32_t> depth_rows;  // [recursions + 1], the first row of each depth
  std::vector<int32_t> cu_rows;     // [groups + 1], the first row of each group
  std::vector<int32_t> before;      // [groups], entries of the lane before the pass
  std::vector<int32_t> after;       // [groups], and after
  std::vector<int32_t> tables;      // [layers, groups, pages], blocks of each group's lane
  int32_t layers, pages;
  int32_t longest;       // rows of a group at most
  int32_t first_groups;  // groups at the first depth
  Copies block_copies;   // to be made before anything is written

  // Hybrid and frozen, whose new entries are not one behind the other:
  std::vector<int32_t> writes;            // [layers, k], addresses of the active tokens' entries
  std::vector<int32_t> exited_rows;       // [e], frozen: slots of tokens that have just exited
  std::vector<int32_t> exited_positions;  // [e]
  std::vector<int32_t> exited_writes;     // [layers, e]
  Copies carried;                         // addresses, to be copied before the block runs

  int32_t groups() const { return static_cast<int32_t>(before.size()); }
  void clear();
};

// What is to be copied after a pass, blocks first.
struct Carry {
  Copies blocks, entries;
};

class StageWalk {
 public:
  // All outlive this; running is in the order of rank.
  StageWalk(const Layout& layout, BlockPool& pool, const std::vector<Sequence*>& running)
      : layout_(layout), pool_(pool), running_(running) {}

  // In this order in a step, for each stage from the first: enter, choose with a flag for each of
  // the entry's rows, and, while run finds work (once, if depthwise), run and advance with a flag
  // for each row of the pass but those of the last depth. A flag says whether the token goes
  // through the next depth; no flags at all say that every one does. Throws std::invalid_argument
  // if their number is wrong.
  const Entry& enter(int32_t stage);
  void choose(std::span<const bool> keep);
  bool run(int32_t stage);
  const Carry& advance(std::span<const bool> keep);

  const Pass& pass() const { return pass_; }

 private:
  struct Part {
    Sequence* sequence;
    size_t number;  // of the unit
    Unit& unit() const { return sequence->units[number]; }
  };
  struct Place {
    const Lane* lane;
    int32_t entry;
  };

  void add(const Part& part);
  void add_to_group(const Lane& lane, int32_t depth, int32_t before);
  void add_rows(Sequence& sequence, const Unit& unit);
  void add_carried(const Sequence& sequence, const Unit& unit, const Lane& lane);
  void fill_tables();
  void keep_active(Unit& unit, std::span<const bool> keep, size_t& next) const;
  void settle(const Part& part);
  void fill_deeper(Sequence& sequence, const Unit& unit);

  const Layout& layout_;
  BlockPool& pool_;
  const std::vector<Sequence*>& running_;
  int32_t stage_ = 0;
  std::vector<Part> parts_;  // of the entry, or of the pass
  std::vector<const Lane*> group_lanes_;
  std::vector<Place> written_, exited_;
  Entry entry_;
  Pass pass_;
  Carry carry_;
};

}  // namespace mor::engine
