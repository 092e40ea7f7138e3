#include "engine/kept.h"

#include <algorithm>
#include <utility>

namespace mor::engine {

namespace {

// Whether `longer` begins with all that `sequence` has.
bool contained(const Sequence& sequence, const Sequence& longer) {
  // Last tokens first: they differ sooner where many begin with the same instructions.
  return sequence.size() <= longer.size() &&
         std::equal(sequence.tokens.rbegin(), sequence.tokens.rend(),
                    longer.tokens.rend() - sequence.size());
}

}  // namespace

void KeptSequences::add(std::unique_ptr<Sequence> sequence) {
  sequence->keep(layout_, pool_);
  for (const auto& other : sequences_) {
    if (contained(*sequence, *other)) {
      sequence->restart(pool_);
      touch(*other);
      return;
    }
  }
  std::erase_if(sequences_, [&](const auto& other) {
    const bool superfluous = contained(*other, *sequence);
    if (superfluous) {
      other->restart(pool_);
    }
    return superfluous;
  });
  if (sequences_.size() == kMost) {
    evict();
  }
  sequences_.push_back(std::move(sequence));
}

void KeptSequences::touch(const Sequence& sequence) {
  const auto found = std::find_if(sequences_.begin(), sequences_.end(),
                                  [&](const auto& other) { return other.get() == &sequence; });
  if (found != sequences_.end()) {
    std::rotate(found, found + 1, sequences_.end());
  }
}

bool KeptSequences::evict() {
  if (sequences_.empty()) {
    return false;
  }
  sequences_.front()->restart(pool_);
  sequences_.erase(sequences_.begin());
  return true;
}

}  // namespace mor::engine
