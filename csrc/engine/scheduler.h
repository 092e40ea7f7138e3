// Who runs: admission, order, preemption, the token budget of a step.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <unordered_map>
#include <vector>

#include "engine/block_pool.h"
#include "engine/kept.h"
#include "engine/layout.h"
#include "engine/sequence.h"
#include "engine/stage_walk.h"

namespace mor::engine {

struct Limits {
  int32_t num_blocks;    // of the pool
  int32_t max_batch;     // sequences that run at once
  int32_t token_budget;  // tokens in flight at once, so rows of a pass; at least max_batch
  bool share_prefixes = true;
};

// The last token of a sequence that has left the model, whose successor is to be sampled.
struct Sampled {
  std::vector<int64_t> ids;   // of the sequences
  std::vector<int32_t> rows;  // slots
};

struct Counters {
  int64_t steps = 0, preemptions = 0;
  int64_t tokens = 0;         // that have left the last stage
  int64_t shared_tokens = 0;  // taken over from another sequence instead
  int64_t evictions = 0;      // finished sequences whose K/V had to make room
};

// First come, first served, by rank: a sequence of priority p goes before those that were submitted
// up to p * kHeadStart steps earlier. As ranks never change, everybody's turn comes.
//
// No step can run out of blocks: what its units take at most is known before it starts, and as
// long as that is more than there is, the running sequence of the last rank is preempted. It waits
// again, with all that it has been given so far as its prompt. The sequence of the first rank is
// never preempted, and by the rule of submit it fits alone, so it finishes.
//
// A sequence that begins with tokens that another has done takes over their entries, in the same
// blocks. It waits for a running one that is still at it. Those of a finished sequence stay as long
// as their room is not needed: before anybody waits or is preempted for want of blocks, they go,
// those used least recently first.
//
// One thread at a time; submit and cancel may be called from any, and take effect in plan.
class Scheduler {
 public:
  static constexpr int64_t kHeadStart = 1000;

  // Throws std::invalid_argument.
  Scheduler(Layout layout, Limits limits);

  // Whether a sequence of so many tokens, all of them at the full depth, fits into the pool alone.
  bool fits(int32_t tokens) const { return layout_.most_blocks(tokens) <= limits_.num_blocks; }
  // A new id and at least one token; no more tokens will be appended than fits allows.
  void submit(int64_t id, std::span<const int32_t> prompt, int32_t priority);
  void cancel(int64_t id);

  // The start of a step: who runs, and what begins. False if there is nothing to do. After it the
  // stages, by walk(), then finish_step.
  bool plan();
  StageWalk& walk() { return walk_; }
  const Sampled& finish_step();

  // After finish_step: the tokens that were sampled, or the end of a sequence. keep: its K/V are
  // good for others.
  void append(std::span<const int64_t> ids, std::span<const int32_t> tokens);
  void finish(int64_t id, bool keep = true);
  // Between steps: gives up what finished sequences have left, also those cancelled by now.
  void drop_kept();

  // [done, stages]: how often each token that the model has done went through each stage; none of
  // a sequence that has not been taken in yet, or has finished.
  std::span<const uint8_t> depth(int64_t id) const;

  const BlockPool& pool() const { return pool_; }
  const Layout& layout() const { return layout_; }
  const Counters& counters() const { return counters_; }
  int32_t num_running() const { return static_cast<int32_t>(running_.size()); }
  int32_t num_waiting() const { return static_cast<int32_t>(waiting_.size()); }
  int32_t num_kept() const { return static_cast<int32_t>(kept_.all().size()); }
  int32_t num_slots_free() const { return static_cast<int32_t>(slots_.size()); }

  // Throws std::logic_error if users of blocks are not those that lanes name, if a slot is lost, or
  // if what is kept is not what its tokens have.
  void check() const;

 private:
  struct Match {
    Sequence* parent = nullptr;
    int32_t tokens = 0;  // that the parent has done and the sequence can take over
    bool grows = false;  // whether it pays to wait for more
  };

  void take_in();
  // Without, and with those of kept sequences.
  int32_t blocks_left() const { return pool_.num_free() - reserved_; }
  int32_t blocks_to_be_had() const { return blocks_left() + pool_.num_kept(); }
  int32_t slots_left() const { return static_cast<int32_t>(slots_.size()) - entering_; }
  bool reserve(Sequence& sequence, int32_t begin);
  void unreserve(Sequence& sequence);
  void plan_tokens();
  void plan_chunks();
  void admit();
  bool admit(Sequence& sequence, const Match& match);
  Sequence* next_waiting(Match& match) const;
  Match match_of(const Sequence& sequence) const;
  int64_t expected_blocks(int32_t tokens) const;
  void preempt(Sequence& sequence);
  void withdraw(Sequence& sequence);
  void begin_units();
  void count_entries(const Sequence& sequence, const Unit& unit);
  void check_blocks() const;
  void check_kept() const;

  const Layout layout_;
  const Limits limits_;
  BlockPool pool_;
  KeptSequences kept_;
  std::unordered_map<int64_t, std::unique_ptr<Sequence>> sequences_;
  std::vector<Sequence*> running_;  // by rank
  std::map<Rank, Sequence*> waiting_;
  std::vector<int32_t> slots_;  // free ones, a stack
  int32_t reserved_ = 0;        // blocks, in the step that is planned
  int32_t entering_ = 0;        // tokens
  int64_t entries_ = 0;         // lanes' entries of the tokens done, times their layers
  Sampled sampled_;
  Counters counters_;
  StageWalk walk_;

  std::mutex inbox_mutex_;
  std::vector<std::unique_ptr<Sequence>> submitted_;
  std::vector<int64_t> cancelled_;
};

}  // namespace mor::engine
