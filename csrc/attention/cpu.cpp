// CPU kernels of the attention family, and their registration.
#include "attention/ops.h"
#include "common/cpu_isa.h"

namespace mor {

MOR_DECLARE_CPU_KERNEL(attention, AttentionParams)
MOR_DECLARE_CPU_KERNEL(attention_bwd, AttentionBwdParams)

#if defined(__x86_64__)
namespace avx512_bf16 {
void attention_bf16(const AttentionParams&);
}
namespace amx {
void attention_bf16(const AttentionParams&);
}
#endif

namespace {

struct Cpu {
  Cpu(const char*, const Tensor&) {}

  static Tensor rows(const Tensor& tensor) { return dense_inner(tensor, 1); }

  static void attention(const AttentionParams& p) {
#if defined(__x86_64__)
    if (p.dtype == DType::kBFloat16 && cpu_isa() == CpuIsa::amx) {
      return amx::attention_bf16(p);
    }
    if (p.dtype == DType::kBFloat16 && cpu_isa() == CpuIsa::avx512_bf16) {
      return avx512_bf16::attention_bf16(p);
    }
#endif
    cpu::attention(p);
  }

  static void paged_attention(const AttentionParams& p) { attention(p); }
  static void attention_bwd(const AttentionBwdParams& p) { cpu::attention_bwd(p); }
};

}  // namespace
}  // namespace mor

STABLE_TORCH_LIBRARY_IMPL(mor, CPU, m) {
  using Ops = mor::AttentionOps<mor::Cpu>;
  m.impl("attention", TORCH_BOX(&Ops::attention));
  m.impl("attention_bwd", TORCH_BOX(&Ops::attention_bwd));
  m.impl("paged_attention", TORCH_BOX(&Ops::paged_attention));
}
