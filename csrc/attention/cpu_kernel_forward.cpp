// Attention forward in the accumulate type, for every dtype and instruction set.
#include "attention/cpu_forward.h"

namespace mor::MOR_ISA {

void attention(const AttentionParams& p) {
  dispatch_dtype(p.dtype, [&]<typename T>() { attention_forward<FmaGemm<T>>(p); });
}

}  // namespace mor::MOR_ISA
