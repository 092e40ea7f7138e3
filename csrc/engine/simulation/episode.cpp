#include "engine/simulation/episode.h"

#include <algorithm>
#include <atomic>
#include <sstream>
#include <stdexcept>
#include <thread>

namespace mor::engine::simulation {

namespace {

constexpr int32_t kRequests = 80;
constexpr int32_t kStepsToCheck = 16;  // the check then takes less than the steps

void require(bool ok, const char* message) {
  if (!ok) {
    throw std::logic_error(message);
  }
}

}  // namespace

Episode::Episode(uint64_t seed)
    : random_(seed),
      world_(random_world(random_, static_cast<KvStrategy>(seed % 4))),
      requests_(random_requests(random_, world_, kRequests, states_)),
      scheduler_(world_.layout(), world_.limits),
      machine_(scheduler_, world_.model, world_.limits.token_budget, states_),
      cancelled_(kRequests, 0),
      given_(kRequests, 0) {}

// ---- two ways to drive it ----

void Episode::run() {
  const double arrivals = random_.one_of({0.05, 0.3, 0.9});
  const double cancels = random_.one_of({0.0, 0.01, 0.1});
  while (ranks_.size() < requests_.size() || !alive_.empty()) {
    while (ranks_.size() < requests_.size() && random_.chance(arrivals)) {
      submit(static_cast<int64_t>(ranks_.size()));
    }
    if (random_.chance(cancels)) {
      cancel_one();
    }
    if (random_.chance(0.003)) {
      scheduler_.drop_kept();
      require(scheduler_.num_kept() == 0, "a sequence is still kept");
    }
    step();
    watch_first();
  }
  close();
}

void Episode::run_threaded() {
  std::atomic<bool> all_submitted = false;
  std::jthread other([&, random = Random(random_.next())]() mutable {
    for (int32_t id = 0; id < kRequests; ++id) {
      scheduler_.submit(id, requests_[id].prompt(), requests_[id].priority);
      if (random.chance(0.2)) {
        const int32_t some = random.in(0, id);
        scheduler_.cancel(some);
        cancelled_[some] = 1;
      }
      while (random.chance(0.7)) {
        std::this_thread::yield();
      }
    }
    all_submitted = true;
  });
  for (;;) {
    const bool nothing_comes = all_submitted;
    if (!step()) {
      if (nothing_comes) {
        break;
      }
      std::this_thread::yield();
    }
  }
  other.join();
  close();
}

void Episode::submit(int64_t id) {
  const Request& request = requests_[id];
  ranks_.push_back({counters().steps - request.priority * Scheduler::kHeadStart, id});
  alive_.insert(ranks_.back());
  scheduler_.submit(id, request.prompt(), request.priority);
}

// One of those that came last, if it is still there.
void Episode::cancel_one() {
  const auto last = static_cast<int32_t>(ranks_.size()) - 1;
  const int32_t id = random_.in(std::max(0, last - 8), std::max(0, last));
  if (last >= 0 && alive_.erase(ranks_[id]) > 0) {
    cancelled_[id] = 1;
    scheduler_.cancel(id);
  }
}

// ---- a step ----

bool Episode::step() {
  if (!scheduler_.plan()) {
    return false;
  }
  ids_.clear();
  tokens_.clear();
  const Sampled& sampled = machine_.step();
  for (size_t i = 0; i < sampled.ids.size(); ++i) {
    give_token(sampled.ids[i], machine_.state(sampled.rows[i]));
  }
  scheduler_.append(ids_, tokens_);
  if (++steps_ % kStepsToCheck == 0) {
    scheduler_.check();
  }
  return true;
}

void Episode::give_token(int64_t id, State state) {
  const Request& request = requests_[id];
  require(given_[id] < request.states.size(), "a sequence goes on that has ended");
  require(state == request.states[given_[id]], "a sequence gets a state that is not its own");
  if (++given_[id] == request.states.size()) {
    finish(id);
  } else {
    ids_.push_back(id);
    tokens_.push_back(world_.model.next_token(state, request.seed));
  }
}

void Episode::finish(int64_t id) {
  require(std::ranges::equal(scheduler_.depth(id), requests_[id].depth), "wrong depths");
  if (!ranks_.empty()) {
    // One at a time, without anybody to wait for, means by rank.
    const bool by_rank = world_.limits.max_batch == 1 && !world_.limits.share_prefixes;
    require(!by_rank || *alive_.begin() == ranks_[id], "a sequence ends before its turn");
    require(alive_.erase(ranks_[id]) == 1, "a sequence ends that has been cancelled");
  }
  const bool keep = !random_.chance(0.05);
  const int32_t kept = scheduler_.num_kept();
  scheduler_.finish(id, keep);
  require(keep || scheduler_.num_kept() == kept, "a sequence is kept that must not be");
}

// ---- what must be so in the end ----

// The first of all makes way for nobody, so it gets its tokens in so many steps.
void Episode::watch_first() {
  if (alive_.empty() || *alive_.begin() != first_) {
    steps_first_ = 0;
    first_ = alive_.empty() ? Rank{} : *alive_.begin();
    return;
  }
  int32_t passes = 1;
  for (const Stage& stage : world_.model.stages) {
    passes += stage.recursions;
  }
  require(++steps_first_ <= 2 * passes * world_.longest, "a sequence starves");
}

void Episode::close() {
  require(!scheduler_.plan(), "something runs that nobody wants");
  for (int32_t id = 0; id < kRequests; ++id) {
    require(cancelled_[id] || given_[id] == requests_[id].states.size(), "a sequence is lost");
  }
  const BlockPool& pool = scheduler_.pool();
  require(scheduler_.num_running() + scheduler_.num_waiting() == 0, "a sequence is left over");
  require(pool.num_free() + pool.num_kept() == pool.num_blocks(), "a block is lost");
  require(scheduler_.num_slots_free() == world_.limits.token_budget, "a slot is lost");
  scheduler_.drop_kept();
  require(pool.num_free() == pool.num_blocks(), "a kept block is lost");
  scheduler_.check();
}

int64_t Episode::cancelled() const {
  int64_t cancelled = 0;
  for (int32_t id = 0; id < kRequests; ++id) {
    cancelled += given_[id] < requests_[id].states.size();
  }
  return cancelled;
}

std::string Episode::world() const {
  std::ostringstream text;
  constexpr const char* names[] = {"recursion_wise", "shared", "hybrid", "frozen"};
  text << names[static_cast<int32_t>(world_.model.strategy)] << ", stages";
  for (const Stage& stage : world_.model.stages) {
    text << " (" << stage.layers << ", " << stage.recursions << ")";
  }
  const Limits& limits = world_.limits;
  text << ", depthwise " << world_.depthwise << ", blocks " << limits.num_blocks << ", batch "
       << limits.max_batch << ", budget " << limits.token_budget << ", sharing "
       << limits.share_prefixes;
  return text.str();
}

}  // namespace mor::engine::simulation
