// Attention forward of bf16 tensors by bf16 dot products: compiled for avx512_bf16 and for amx.
#include "attention/cpu_dot_gemm.h"
#include "attention/cpu_forward.h"

namespace mor::MOR_ISA {

void attention_bf16(const AttentionParams& p) {
  attention_forward<DotGemm>(p);
}

}  // namespace mor::MOR_ISA
