// Run-time choice of the instruction set. Kernel files (cpu_kernel*.cpp) are compiled once per
// instruction set with MOR_ISA set to its name, and live in the namespace of that name.
#pragma once

#include <span>

namespace mor {

enum class CpuIsa { baseline, avx2, avx512, avx512_bf16, amx };

// The best set that this machine has, or the lower one that MOR_CPU_CAPABILITY names.
CpuIsa cpu_isa();
const char* cpu_isa_name();

// The names that MOR_CPU_CAPABILITY may have on this machine, baseline first.
std::span<const char* const> available_cpu_isas();

}  // namespace mor

// Declares `void name(const Params&)` for every instruction set, and the function of the same
// name in namespace mor::cpu that calls the one for this machine.
#if defined(__x86_64__)
#define MOR_DECLARE_CPU_KERNEL(name, Params) \
  namespace baseline {                       \
  void name(const Params&);                  \
  }                                          \
  namespace avx2 {                           \
  void name(const Params&);                  \
  }                                          \
  namespace avx512 {                         \
  void name(const Params&);                  \
  }                                          \
  namespace cpu {                            \
  inline void name(const Params& params) {   \
    switch (cpu_isa()) {                     \
      case CpuIsa::baseline:                 \
        return baseline::name(params);       \
      case CpuIsa::avx2:                     \
        return avx2::name(params);           \
      default:                               \
        return avx512::name(params);         \
    }                                        \
  }                                          \
  }
#else
#define MOR_DECLARE_CPU_KERNEL(name, Params) \
  namespace baseline {                       \
  void name(const Params&);                  \
  }                                          \
  namespace cpu {                            \
  inline void name(const Params& params) {   \
    return baseline::name(params);           \
  }                                          \
  }
#endif
