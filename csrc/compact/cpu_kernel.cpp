// CPU kernels of the compact family.
#include "common/parallel.h"
#include "common/vec.h"
#include "compact/params.h"

namespace mor::MOR_ISA {

void gather_tokens(const GatherTokensParams& p) {
  const int64_t row_bytes = p.row_size * p.element_bytes;
  const bool stream = p.count * row_bytes > kStreamBytes;
  const auto* x = static_cast<const char*>(p.x);
  auto* out = static_cast<char*>(p.out);
  parallel_for(p.count, 1 + 65536 / (row_bytes + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (p.index[i] < 0) {
        std::memset(out + i * row_bytes, 0, static_cast<size_t>(row_bytes));
        continue;
      }
      const char* row = x + p.index[i] * p.row_stride * p.element_bytes;
      if (stream) {
        stream_copy(out + i * row_bytes, row, row_bytes);
      } else {
        std::memcpy(out + i * row_bytes, row, static_cast<size_t>(row_bytes));
      }
    }
    if (stream) {
      fence();
    }
  });
}

}  // namespace mor::MOR_ISA
