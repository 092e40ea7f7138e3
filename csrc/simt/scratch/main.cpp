// scratch_kernels [--at-once | --flush] NAME...: runs each kernel and prints a line: the first
// words of its data or what the executor says is wrong. Standard input has the words that the data
// starts with; the rest is 0.
//
// No name: prints the names. --at-once: each on an OS thread of its own; --flush: the caller
// flushes denormals to zero.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "simt/scratch/scratch.h"

namespace mor {
namespace {

std::vector<int32_t> read_input() {
  std::vector<int32_t> words;
  for (int32_t word; isatty(STDIN_FILENO) == 0 && std::scanf("%d", &word) == 1;) {
    words.push_back(word);
  }
  words.resize(kWords);
  return words;
}

ScratchKernels all_kernels() {
  ScratchKernels kernels = primitive_kernels();
  kernels.merge(pattern_kernels());
  kernels.merge(fault_kernels());
  return kernels;
}

std::string run(const std::string& name, const std::vector<int32_t>& input) {
  const Scratch scratch = all_kernels().at(name);
  // On the heap for AddressSanitizer, aligned for copy_async.
  struct alignas(16) Data {
    int32_t words[kWords];
  };
  const auto data = std::make_unique<Data>();
  std::ranges::copy(input, data->words);
  const LaunchShape shape{scratch.grid, scratch.block, scratch.shared_bytes};
  if (const cudaError_t error = launch(name.c_str(), scratch.kernel, shape, nullptr, data->words)) {
    return cudaGetErrorString(error);
  }
  std::ostringstream text;
  for (int i = 0; i < scratch.words; ++i) {
    text << (i > 0 ? " " : "") << data->words[i];
  }
  return text.str();
}

}  // namespace
}  // namespace mor

int main(int argc, char** argv) {
  std::vector<std::string> names(argv + 1, argv + argc);
  const std::string option = names.empty() || names[0][0] != '-' ? "" : names[0];
  names.erase(names.begin(), names.begin() + !option.empty());
#if defined(__x86_64__)
  if (option == "--flush") {
    __builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() | 0x8040);
  }
#endif
  if (names.empty()) {
    for (const auto& [name, scratch] : mor::all_kernels()) {
      std::printf("%s\n", name.c_str());
    }
    return 0;
  }
  const std::vector<int32_t> input = mor::read_input();
  std::vector<std::string> lines(names.size());
  std::vector<std::thread> threads;
  for (size_t i = 0; i < names.size(); ++i) {
    const auto run = [&, i] { lines[i] = mor::run(names[i], input); };
    if (option == "--at-once") {
      threads.emplace_back(run);
    } else {
      run();
    }
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  for (const std::string& line : lines) {
    std::printf("%s\n", line.c_str());
  }
}
