// CUDA host side of the kv_cache family.
#include "kv_cache/kv_cache.h"
#include "kv_cache/launch.h"

namespace mor {
namespace {

// On the current stream of like's device.
template <typename Params>
auto on_device(const Tensor& like, cudaError_t (*kernel)(const Params&, cudaStream_t)) {
  return [&like, kernel](const Checks& check, const Params& params) {
    const OnDevice device(like);
    const cudaError_t error = kernel(params, static_cast<cudaStream_t>(device.stream()));
    check.launched(error, cudaGetErrorString(error));
  };
}

std::tuple<Tensor, Tensor> rotary(const Tensor& query, const Tensor& key, const Tensor& cos,
                                  const Tensor& sin, const Tensor& positions) {
  return run_rotary(on_device(query, cuda::rotary), query, key, cos, sin, positions);
}

void kv_append(const Tensor& key, const Tensor& value, const Tensor& key_cache,
               const Tensor& value_cache, const Tensor& block_table, const Tensor& cache_seqlens,
               const Tensor& cu_seqlens) {
  run_kv_append(on_device(key, cuda::kv_append), key, value, key_cache, value_cache, block_table,
                cache_seqlens, cu_seqlens);
}

Tensor rotary_kv_append(const Tensor& query, const Tensor& key, const Tensor& value,
                        const Tensor& cos, const Tensor& sin, const Tensor& positions,
                        const Tensor& key_cache, const Tensor& value_cache,
                        const Tensor& block_table, const Tensor& cache_seqlens,
                        const Tensor& cu_seqlens) {
  return run_rotary_kv_append(on_device(query, cuda::rotary_kv_append), query, key, value, cos, sin,
                              positions, key_cache, value_cache, block_table, cache_seqlens,
                              cu_seqlens);
}

}  // namespace
}  // namespace mor

MOR_LIBRARY_IMPL_CUDA(m) {
  m.impl("rotary", TORCH_BOX(&mor::rotary));
  m.impl("kv_append", TORCH_BOX(&mor::kv_append));
  m.impl("rotary_kv_append", TORCH_BOX(&mor::rotary_kv_append));
}
