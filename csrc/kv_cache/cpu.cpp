// CPU side of the kv_cache family.
#include "kv_cache/kv_cache.h"

namespace mor {
namespace {

template <typename Params>
auto on_cpu(void (*kernel)(const Params&)) {
  return [kernel](const Checks&, const Params& params) { kernel(params); };
}

std::tuple<Tensor, Tensor> rotary(const Tensor& query, const Tensor& key, const Tensor& cos,
                                  const Tensor& sin, const Tensor& positions) {
  return run_rotary(on_cpu(cpu::rotary), query, key, cos, sin, positions);
}

void kv_append(const Tensor& key, const Tensor& value, const Tensor& key_cache,
               const Tensor& value_cache, const Tensor& block_table, const Tensor& cache_seqlens,
               const Tensor& cu_seqlens) {
  run_kv_append(on_cpu(cpu::kv_append), key, value, key_cache, value_cache, block_table,
                cache_seqlens, cu_seqlens);
}

Tensor rotary_kv_append(const Tensor& query, const Tensor& key, const Tensor& value,
                        const Tensor& cos, const Tensor& sin, const Tensor& positions,
                        const Tensor& key_cache, const Tensor& value_cache,
                        const Tensor& block_table, const Tensor& cache_seqlens,
                        const Tensor& cu_seqlens) {
  return run_rotary_kv_append(on_cpu(cpu::rotary_kv_append), query, key, value, cos, sin, positions,
                              key_cache, value_cache, block_table, cache_seqlens, cu_seqlens);
}

}  // namespace
}  // namespace mor

STABLE_TORCH_LIBRARY_IMPL(mor, CPU, m) {
  m.impl("rotary", TORCH_BOX(&mor::rotary));
  m.impl("kv_append", TORCH_BOX(&mor::kv_append));
  m.impl("rotary_kv_append", TORCH_BOX(&mor::rotary_kv_append));
}
