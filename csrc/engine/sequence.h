// A sequence in the engine: its tokens, its lanes, and the units of work that it has in flight.
#pragma once

#include <compare>
#include <cstdint>
#include <deque>
#include <span>
#include <vector>

#include "engine/lane.h"
#include "engine/layout.h"

namespace mor::engine {

// Consecutive tokens of a sequence on their way through the model: a chunk of its prompt, or the
// token that was sampled last. Units of a sequence follow each other: one is never at a stage and
// depth before those ahead of it have been there, so lanes are filled in the order of the tokens.
struct Unit {
  static constexpr int32_t kAtEntry = -1;

  int32_t first, count;           // tokens [first, first + count)
  int32_t stage = 0;              // num_stages when it has left the last
  int32_t depth = kAtEntry;       // that it is about to go through, from 0
  std::vector<int32_t> slots;     // [count], rows of the caller's hidden states
  std::vector<int32_t> active{};  // tokens of the unit (from 0, ascending) that go through it
  std::vector<int32_t> exited{};  // frozen: those that were active at the depth before only
  std::vector<int32_t> listed{};  // those whose entries queries see; see list_all
  int32_t base = 0;               // entry of the first listed one, in every lane of the stage

  bool inside() const { return depth != kAtEntry; }
};

// Who goes first: smaller ranks.
struct Rank {
  int64_t step;  // of arrival, less the head start of a priority
  int64_t id;
  auto operator<=>(const Rank&) const = default;
};

struct Sequence {
  Sequence(Rank rank, std::span<const int32_t> prompt, const Layout& layout);

  const Rank rank;
  std::vector<int32_t> tokens;  // the prompt and what was sampled
  std::vector<uint8_t> depth;   // [tokens, stages], how often each token went through each stage
  std::vector<Lane> lanes;      // as Layout numbers them
  std::deque<Unit> units;       // in flight, in the order of their tokens
  int32_t entered = 0;          // tokens that have begun, or been taken over from another sequence
  int32_t done = 0;             // tokens that have left the last stage

  // What a step plans.
  int32_t entering = 0;  // tokens that begin
  int32_t reserved = 0;  // blocks that may be taken

  int32_t size() const { return static_cast<int32_t>(tokens.size()); }
  int32_t remaining() const { return size() - entered; }
  void append(int32_t token, const Layout& layout);

  // Blocks that the units take at most in a step in which so many more tokens begin.
  int32_t blocks_for_step(const Layout& layout, const BlockPool& pool, int32_t begin) const;
  // Entries that the first tokens, which are done, have in each lane.
  std::vector<int32_t> entries_of(int32_t count, const Layout& layout) const;
  // Takes over the first tokens of another sequence, which are done there and the same here.
  void share_prefix(const Sequence& parent, int32_t count, const Layout& layout, BlockPool& pool);
  // Cuts it to what is done, and that is kept. The slots of units are the caller's to take back
  // before.
  void keep(const Layout& layout, BlockPool& pool);
  // Back to where nothing has begun. The slots of units are the caller's to take back before.
  void restart(BlockPool& pool);
};

}  // namespace mor::engine
