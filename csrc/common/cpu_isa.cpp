#include "common/cpu_isa.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace mor {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__)
// Linux saves the AMX tile registers only for processes that have asked for them.
bool request_amx() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool cpu_has_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;
  return (edx & kTile) && (edx & kBf16);
}

CpuIsa detect() {
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    if (!__builtin_cpu_supports("avx512bf16")) {
      return CpuIsa::avx512;
    }
    return cpu_has_amx() && request_amx() ? CpuIsa::amx : CpuIsa::avx512_bf16;
  }
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return avx2 ? CpuIsa::avx2 : CpuIsa::baseline;
}
#else
CpuIsa detect() {
  return CpuIsa::baseline;
}
#endif

// A name that this machine does not have is an error when mor_ext is imported.
CpuIsa choose() {
  const auto available = available_cpu_isas();
  const char* wanted = std::getenv("MOR_CPU_CAPABILITY");
  for (size_t i = 0; wanted != nullptr && i < available.size(); ++i) {
    if (std::strcmp(wanted, available[i]) == 0) {
      return static_cast<CpuIsa>(i);
    }
  }
  return static_cast<CpuIsa>(available.size() - 1);
}

}  // namespace

CpuIsa cpu_isa() {
  static const CpuIsa isa = choose();
  return isa;
}

const char* cpu_isa_name() {
  return kNames[static_cast<int>(cpu_isa())];
}

std::span<const char* const> available_cpu_isas() {
  static const size_t count = static_cast<size_t>(detect()) + 1;
  return {kNames, count};
}

}  // namespace mor
