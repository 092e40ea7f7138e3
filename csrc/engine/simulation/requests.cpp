#include "engine/simulation/requests.h"

#include <algorithm>
#include <utility>

namespace mor::engine::simulation {

World random_world(Random& random, KvStrategy strategy) {
  World world;
  world.model.strategy = strategy;
  world.model.vocabulary = random.one_of({2, 3, 50});
  for (int32_t left = random.in(1, 3); left > 0; --left) {
    world.model.stages.push_back(
        {.layers = random.in(1, 2), .recursions = random.one_of({1, 1, 2, 3, 4})});
    world.model.going_on.push_back(random.one_of({40, 128, 200, 256, 256}));
  }
  world.depthwise = random.chance(0.6);
  world.longest = random.one_of({20, 40, 80});
  world.limits.max_batch = random.one_of({1, 2, 3, 4, 6, 8});
  world.limits.token_budget = world.limits.max_batch + random.one_of({0, 2, 10, 40});
  world.limits.share_prefixes = random.chance(0.9);
  const auto least = static_cast<int32_t>(world.layout().most_blocks(world.longest));
  world.limits.num_blocks =
      static_cast<int32_t>(least * random.one_of({1.0, 1.2, 1.5, 2.0, 3.0, 20.0}));
  return world;
}

namespace {

// Often the beginning of an earlier request: of its prompt, or of a conversation with it. One token
// of that may be another.
std::vector<int32_t> random_prompt(Random& random, const World& world,
                                   const std::vector<Request>& earlier) {
  std::vector<int32_t> prompt;
  if (!earlier.empty() && random.chance(0.6)) {
    const auto number = static_cast<int32_t>(earlier.size());
    const Request& other =
        earlier[random.in(std::max(0, number - random.one_of({4, 20})), number - 1)];
    const int32_t most = std::min(other.size(), world.longest - 1);
    const int32_t taken =
        random.one_of({std::min(other.prompt_size, most), most, random.in(1, most)});
    prompt.assign(other.tokens.begin(), other.tokens.begin() + taken);
    if (random.chance(0.1)) {
      prompt[random.in(0, taken - 1)] = random.in(0, world.model.vocabulary - 1);
    }
  }
  const auto taken = static_cast<int32_t>(prompt.size());
  const int32_t length = random.in(std::max(taken, 1), world.longest - 1);
  while (static_cast<int32_t>(prompt.size()) < length) {
    prompt.push_back(random.in(0, world.model.vocabulary - 1));
  }
  return prompt;
}

}  // namespace

std::vector<Request> random_requests(Random& random, const World& world, int32_t count,
                                     std::unordered_set<State>& states) {
  std::vector<Request> requests;
  while (static_cast<int32_t>(requests.size()) < count) {
    Request request;
    request.tokens = random_prompt(random, world, requests);
    request.prompt_size = request.size();
    request.priority = random.one_of({0, 0, 0, 0, 1, -1});
    request.seed = random.in(0, 1);
    const int32_t size =
        random.in(request.prompt_size + 1, std::min(request.prompt_size + 12, world.longest));
    Reference reference(world.model);
    for (int32_t i = 0; i < size - 1; ++i) {
      const State state = reference.append(request.tokens[i], states);
      if (i >= request.prompt_size - 1) {
        request.states.push_back(state);
        request.tokens.push_back(world.model.next_token(state, request.seed));
      }
    }
    request.depth = reference.depth();
    requests.push_back(std::move(request));
  }
  return requests;
}

}  // namespace mor::engine::simulation
