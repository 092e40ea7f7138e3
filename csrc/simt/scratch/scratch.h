// Small kernels, right and wrong on purpose, with which python_tests/test_simt.py tests the
// executor.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "common/launch.cuh"

namespace mor {

constexpr int kWords = 1 << 16;

struct Scratch {
  void (*kernel)(int32_t* data);  // [kWords], input and output
  int block = 64;
  int64_t shared_bytes = 256;
  Index3 grid = {1, 1, 1};
  int words = 64;  // of data that are printed
};

using ScratchKernels = std::map<std::string, Scratch>;

ScratchKernels primitive_kernels();  // what each primitive gives
ScratchKernels pattern_kernels();    // usual patterns, each also with one mistake
ScratchKernels fault_kernels();      // other mistakes

}  // namespace mor
