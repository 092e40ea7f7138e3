#include "engine/scheduler.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

namespace mor::engine {

namespace {

void check_limit(bool ok, const char* name, const char* rule, int32_t value) {
  if (!ok) {
    throw std::invalid_argument(std::string(name) + " must be " + rule + ", got " +
                                std::to_string(value));
  }
}

bool ranks_before(const Sequence* a, const Sequence* b) {
  return a->rank < b->rank;
}

}  // namespace

Scheduler::Scheduler(Layout layout, Limits limits)
    : layout_(std::move(layout)),
      limits_(limits),
      pool_(limits.num_blocks),
      kept_(layout_, pool_),
      walk_(layout_, pool_, running_) {
  check_limit(limits.max_batch >= 1, "max_batch", "at least 1", limits.max_batch);
  check_limit(limits.token_budget >= limits.max_batch, "token_budget", "at least max_batch",
              limits.token_budget);
  slots_.resize(limits.token_budget);
  std::iota(slots_.rbegin(), slots_.rend(), 0);
}

// ---- from any thread ----

void Scheduler::submit(int64_t id, std::span<const int32_t> prompt, int32_t priority) {
  if (prompt.empty()) {
    throw std::invalid_argument("prompt must have at least one token, got none");
  }
  const std::lock_guard lock(inbox_mutex_);
  const Rank rank{counters_.steps - priority * kHeadStart, id};
  submitted_.push_back(std::make_unique<Sequence>(rank, prompt, layout_));
}

void Scheduler::cancel(int64_t id) {
  const std::lock_guard lock(inbox_mutex_);
  cancelled_.push_back(id);
}

// Under the lock.
void Scheduler::take_in() {
  for (auto& sequence : submitted_) {
    waiting_.emplace(sequence->rank, sequence.get());
    sequences_.emplace(sequence->rank.id, std::move(sequence));
  }
  submitted_.clear();
  for (const int64_t id : cancelled_) {
    if (sequences_.contains(id)) {  // it may have finished in the meantime
      finish(id);
    }
  }
  cancelled_.clear();
}

// ---- the plan of a step ----

bool Scheduler::plan() {
  {
    const std::lock_guard lock(inbox_mutex_);
    ++counters_.steps;
    take_in();
  }
  reserved_ = entering_ = 0;
  for (Sequence* sequence : running_) {
    sequence->reserved = sequence->entering = 0;
  }
  const int64_t preemptions = counters_.preemptions;
  plan_tokens();
  plan_chunks();
  if (counters_.preemptions == preemptions) {  // what was preempted would come right back
    admit();
  }
  begin_units();
  return !running_.empty();
}

// Puts blocks aside for what a sequence has in flight and `begin` more tokens, instead of what was
// put aside for it before. False if there are not enough, even without any kept sequence.
bool Scheduler::reserve(Sequence& sequence, int32_t begin) {
  int32_t blocks = sequence.blocks_for_step(layout_, pool_, begin);
  while (blocks - sequence.reserved > blocks_left()) {
    if (!kept_.evict()) {
      return false;
    }
    ++counters_.evictions;
    // Fewer, if it no longer shares a page that it appends to.
    blocks = sequence.blocks_for_step(layout_, pool_, begin);
  }
  unreserve(sequence);
  reserved_ += sequence.reserved = blocks;
  entering_ += sequence.entering = begin;
  return true;
}

void Scheduler::unreserve(Sequence& sequence) {
  reserved_ -= std::exchange(sequence.reserved, 0);
  entering_ -= std::exchange(sequence.entering, 0);
}

// What is in flight goes on, and single tokens begin: decoding is not held up by prompts.
void Scheduler::plan_tokens() {
  for (size_t i = 0; i < running_.size(); ++i) {
    Sequence& sequence = *running_[i];
    const bool one = sequence.remaining() == 1 && slots_left() > 0;
    while (!reserve(sequence, one ? 1 : 0)) {
      Sequence& last = *running_.back();
      preempt(last);
      if (&last == &sequence) {
        return;
      }
    }
  }
}

// Chunks of prompts, as long as budget and blocks allow.
void Scheduler::plan_chunks() {
  for (size_t i = 0; i < running_.size(); ++i) {
    Sequence& sequence = *running_[i];
    if (sequence.remaining() <= 1) {
      continue;
    }
    int32_t chunk = std::min(sequence.remaining(), slots_left());
    while (chunk > 0 && !reserve(sequence, chunk)) {
      if (chunk > 1) {
        chunk /= 2;
      } else if (running_.back() != &sequence) {
        preempt(*running_.back());
      } else {
        break;
      }
    }
  }
}

void Scheduler::admit() {
  Match match;
  while (Sequence* sequence = next_waiting(match)) {
    if (admit(*sequence, match)) {
      continue;
    }
    if (running_.empty() || !ranks_before(sequence, running_.back())) {
      return;
    }
    preempt(*running_.back());
  }
}

bool Scheduler::admit(Sequence& sequence, const Match& match) {
  if (num_running() == limits_.max_batch || slots_left() == 0) {
    return false;
  }
  bool roomy = true;
  if (match.parent != nullptr) {
    sequence.share_prefix(*match.parent, match.tokens, layout_, pool_);
    kept_.touch(*match.parent);
    // From now on the parent has to copy a page before it appends to it.
    roomy = reserve(*match.parent, match.parent->entering);
  }
  // Room for all of it, and for the others to go on, so that it is not preempted halfway.
  const int64_t wanted =
      expected_blocks(sequence.remaining()) + num_running() * layout_.most_blocks(1);
  roomy = roomy && (running_.empty() || wanted <= blocks_to_be_had());
  int32_t chunk = roomy ? std::min(sequence.remaining(), slots_left()) : 0;
  while (chunk > 0 && !reserve(sequence, chunk)) {
    chunk /= 2;
  }
  if (chunk == 0) {
    sequence.restart(pool_);
    return false;
  }
  counters_.shared_tokens += match.tokens;
  waiting_.erase(sequence.rank);
  running_.insert(std::lower_bound(running_.begin(), running_.end(), &sequence, ranks_before),
                  &sequence);
  return true;
}

// The first by rank, but for those that wait until a running sequence has done their prefix.
Sequence* Scheduler::next_waiting(Match& match) const {
  int32_t passed_over = 0;
  for (const auto& [rank, sequence] : waiting_) {
    match = match_of(*sequence);
    if (!match.grows) {
      return sequence;
    }
    if (++passed_over == limits_.max_batch) {
      break;
    }
  }
  return nullptr;
}

Scheduler::Match Scheduler::match_of(const Sequence& sequence) const {
  Match best;
  if (!limits_.share_prefixes) {
    return best;
  }
  int32_t most = 0;  // when all have done what they know
  const auto compare = [&](Sequence& other) {
    // Its last token is to be done in any case, for what comes next.
    const int32_t length = std::min(sequence.size() - 1, other.size());
    const auto end = sequence.tokens.begin() + length;
    const auto differs = std::mismatch(sequence.tokens.begin(), end, other.tokens.begin()).first;
    const auto common = static_cast<int32_t>(differs - sequence.tokens.begin());
    most = std::max(most, common);
    const int32_t done = std::min(common, other.done);
    if (done >= kBlockSize && done > best.tokens) {
      best = {.parent = &other, .tokens = done};
    }
  };
  for (Sequence* other : running_) {
    compare(*other);
  }
  for (const auto& other : kept_.all()) {
    // The first token beyond the best shows of most that they are no better.
    if (best.tokens < std::min(sequence.size(), other->size()) &&
        sequence.tokens[best.tokens] == other->tokens[best.tokens]) {
      compare(*other);
    }
  }
  best.grows = most - best.tokens >= kBlockSize;
  return best;
}

// By the share of the lanes that tokens have had entries in so far.
int64_t Scheduler::expected_blocks(int32_t tokens) const {
  const int64_t most = layout_.most_blocks(tokens);
  const int64_t most_entries = counters_.tokens * layout_.most_blocks(1);
  if (most_entries == 0) {
    return most;
  }
  return static_cast<int64_t>(static_cast<double>(most) * entries_ / most_entries);
}

void Scheduler::preempt(Sequence& sequence) {
  withdraw(sequence);
  sequence.restart(pool_);
  waiting_.emplace(sequence.rank, &sequence);
  ++counters_.preemptions;
}

// Takes a running sequence out, and its slots. It still has its lanes.
void Scheduler::withdraw(Sequence& sequence) {
  unreserve(sequence);
  for (const Unit& unit : sequence.units) {
    slots_.insert(slots_.end(), unit.slots.begin(), unit.slots.end());
  }
  std::erase(running_, &sequence);
}

void Scheduler::begin_units() {
  for (Sequence* sequence : running_) {
    const int32_t count = sequence->entering;
    if (count == 0) {
      continue;
    }
    const auto first_slot = slots_.end() - count;
    sequence->units.push_back(
        {.first = sequence->entered, .count = count, .slots = {first_slot, slots_.end()}});
    slots_.erase(first_slot, slots_.end());
    const auto depth = sequence->depth.begin() + sequence->entered * layout_.num_stages();
    std::fill_n(depth, count * layout_.num_stages(), 0);  // of a preempted run
    sequence->entered += count;
  }
}

// ---- the end of a step ----

const Sampled& Scheduler::finish_step() {
  sampled_.ids.clear();
  sampled_.rows.clear();
  for (Sequence* sequence : running_) {
    auto& units = sequence->units;
    while (!units.empty() && units.front().stage == layout_.num_stages()) {
      const Unit& unit = units.front();
      sequence->done += unit.count;
      count_entries(*sequence, unit);
      if (sequence->done == sequence->size()) {
        sampled_.ids.push_back(sequence->rank.id);
        sampled_.rows.push_back(unit.slots.back());
      }
      slots_.insert(slots_.end(), unit.slots.begin(), unit.slots.end());
      units.pop_front();
    }
  }
  return sampled_;
}

void Scheduler::count_entries(const Sequence& sequence, const Unit& unit) {
  counters_.tokens += unit.count;
  const int32_t stages = layout_.num_stages();
  for (int32_t i = unit.first * stages; i < (unit.first + unit.count) * stages; ++i) {
    const int32_t lanes = layout_.lanes_of_depth(i % stages, sequence.depth[i]);
    entries_ += lanes * layout_.stage(i % stages).layers;
  }
}

void Scheduler::append(std::span<const int64_t> ids, std::span<const int32_t> tokens) {
  if (ids.size() != tokens.size()) {
    throw std::invalid_argument("tokens must be one for each id");
  }
  for (size_t i = 0; i < ids.size(); ++i) {
    sequences_.at(ids[i])->append(tokens[i], layout_);
  }
}

void Scheduler::finish(int64_t id, bool keep) {
  std::unique_ptr<Sequence> sequence = std::move(sequences_.at(id));
  sequences_.erase(id);
  if (waiting_.erase(sequence->rank) == 0) {
    withdraw(*sequence);
  }
  if (keep && limits_.share_prefixes && sequence->done >= kBlockSize) {
    kept_.add(std::move(sequence));
  } else {
    sequence->restart(pool_);
  }
}

void Scheduler::drop_kept() {
  {
    const std::lock_guard lock(inbox_mutex_);
    take_in();
  }
  while (kept_.evict()) {
  }
}

std::span<const uint8_t> Scheduler::depth(int64_t id) const {
  const auto found = sequences_.find(id);
  if (found == sequences_.end()) {
    return {};
  }
  const Sequence& sequence = *found->second;
  return {sequence.depth.data(), static_cast<size_t>(sequence.done) * layout_.num_stages()};
}

}  // namespace mor::engine
