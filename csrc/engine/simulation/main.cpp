// simulation SEED STEPS [threaded]: random episodes with seeds from SEED on, until so many steps
// are done. A line of figures, or of what went wrong and the seed that alone leads there again.
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <string>

#include "engine/simulation/episode.h"

using mor::engine::simulation::Episode;

namespace {

struct Figures {
  int64_t steps = 0, requests = 0, cancelled = 0, preemptions = 0, shared_tokens = 0, evictions = 0;

  void add(const Episode& episode) {
    steps += episode.steps();
    requests += episode.requests();
    cancelled += episode.cancelled();
    preemptions += episode.counters().preemptions;
    shared_tokens += episode.counters().shared_tokens;
    evictions += episode.counters().evictions;
  }
};

}  // namespace

int main(int argc, char** argv) {
  const bool threaded = argc == 4 && std::string(argv[3]) == "threaded";
  if (argc != 3 && !threaded) {
    std::cerr << "simulation SEED STEPS [threaded]\n";
    return EXIT_FAILURE;
  }
  const int64_t steps = std::stoll(argv[2]);
  Figures figures;
  for (uint64_t seed = std::stoull(argv[1]); figures.steps < steps; ++seed) {
    Episode episode(seed);
    try {
      threaded ? episode.run_threaded() : episode.run();
    } catch (const std::exception& problem) {
      std::cerr << problem.what() << " (seed " << seed << ", step " << episode.steps() << ", after "
                << figures.steps << " of other seeds; " << episode.world() << ")\n";
      return EXIT_FAILURE;
    }
    figures.add(episode);
  }
  std::cout << "steps " << figures.steps << ", requests " << figures.requests << ", cancelled "
            << figures.cancelled << ", preemptions " << figures.preemptions << ", shared tokens "
            << figures.shared_tokens << ", evictions " << figures.evictions << "\n";
}
