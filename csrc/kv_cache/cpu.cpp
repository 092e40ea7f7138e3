// CPU host side of the kv_cache family: checks, allocation, registration.
#include "kv_cache/kv_cache.h"

namespace mor {
namespace {

// Copies of the small arguments in the layout that kernels read; most calls copy nothing.
struct DenseTable {
  DenseTable(const Checks& check, const Tensor& query, const Tensor& cos, const Tensor& sin,
             const Tensor& positions)
      : cos_(rows_of(cos, accumulate_dtype(query))),
        sin_(rows_of(sin, accumulate_dtype(query))),
        positions_(dense(positions)) {
    check.within("positions", positions_.const_data_ptr<int32_t>(), positions_.numel(), 0,
                 cos_.size(0));
  }

  RotaryTable view() const {
    return {.cos = cos_.const_data_ptr(),
            .sin = sin_.const_data_ptr(),
            .cos_stride = cos_.stride(0),
            .sin_stride = sin_.stride(0),
            .positions = positions_.const_data_ptr<int32_t>()};
  }

 private:
  static Tensor rows_of(const Tensor& table, ScalarType dtype) {
    const bool same = table.scalar_type() == dtype;
    return dense_inner(same ? table : torch::stable::to(table, dtype), 1);
  }

  Tensor cos_, sin_, positions_;
};

struct DenseLanes {
  DenseLanes(const Checks& check, const Tensor& key_cache, int64_t tokens,
             const Tensor& block_table, const Tensor& cache_seqlens, const Tensor& cu_seqlens)
      : block_size_(key_cache.size(1)),
        block_table_(dense(block_table)),
        cache_seqlens_(dense(cache_seqlens)),
        cu_seqlens_(dense(cu_seqlens)) {
    const Lanes p = view();
    const int64_t capacity = p.max_blocks * block_size_;
    check.cumulative("cu_seqlens", p.cu_seqlens, cache_seqlens.size(0), tokens);
    for (int64_t lane = 0; lane < cache_seqlens.size(0); ++lane) {
      const int64_t added = p.cu_seqlens[lane + 1] - p.cu_seqlens[lane];
      const int64_t begin = p.cache_seqlens[lane], end = begin + added;
      if (begin < 0 || end > capacity) {
        check.fail("cache_seqlens",
                   str("in [0, ", capacity, " - ", added, " new] at lane ", lane,
                       ", whose capacity is max_blocks * block_size = ", capacity),
                   begin);
      }
      for (int64_t i = begin / block_size_; added > 0 && i * block_size_ < end; ++i) {
        const int32_t block = p.block_table[lane * p.max_blocks + i];
        if (block < 0 || block >= key_cache.size(0)) {
          check.fail("block_table", str("in [0, ", key_cache.size(0), ") where a token is written"),
                     str(block, " at lane ", lane, ", block ", i));
        }
      }
    }
  }

  Lanes view() const {
    return {.block_table = block_table_.const_data_ptr<int32_t>(),
            .cache_seqlens = cache_seqlens_.const_data_ptr<int32_t>(),
            .cu_seqlens = cu_seqlens_.const_data_ptr<int32_t>(),
            .max_blocks = block_table_.size(1),
            .block_size = block_size_};
  }

 private:
  int64_t block_size_;
  Tensor block_table_, cache_seqlens_, cu_seqlens_;
};

Tensor new_like(const Tensor& x) {
  return new_tensor(x, {x.size(0), x.size(1), x.size(2)});
}

std::tuple<Tensor, Tensor> rotary(const Tensor& query, const Tensor& key, const Tensor& cos,
                                  const Tensor& sin, const Tensor& positions) {
  const Checks check("rotary");
  check_rotary(check, query, key, cos, sin, positions);
  const DenseTable table(check, query, cos, sin, positions);

  const Tensor rows_q = dense_inner(query, 1), rows_k = dense_inner(key, 1);
  Tensor query_out = new_like(query), key_out = new_like(key);
  cpu::rotary({.query = heads_of(rows_q),
               .key = heads_of(rows_k),
               .query_out = query_out.mutable_data_ptr(),
               .key_out = key_out.mutable_data_ptr(),
               .table = table.view(),
               .tokens = query.size(0),
               .head_dim = query.size(2),
               .dtype = dtype_of(query)});
  return {query_out, key_out};
}

void kv_append(const Tensor& key, const Tensor& value, const Tensor& key_cache,
               const Tensor& value_cache, const Tensor& block_table, const Tensor& cache_seqlens,
               const Tensor& cu_seqlens) {
  const Checks check("kv_append");
  check_append(check, key, value, key_cache, value_cache, block_table, cache_seqlens, cu_seqlens);
  const DenseLanes lanes(check, key_cache, key.size(0), block_table, cache_seqlens, cu_seqlens);

  const Tensor rows_k = dense_inner(key, 1), rows_v = dense_inner(value, 1);
  cpu::kv_append({.key = heads_of(rows_k),
                  .value = heads_of(rows_v),
                  .key_cache = blocks_of(key_cache),
                  .value_cache = blocks_of(value_cache),
                  .lanes = lanes.view(),
                  .tokens = key.size(0),
                  .head_dim = key.size(2),
                  .element_bytes = static_cast<int64_t>(key.element_size())});
}

Tensor rotary_kv_append(const Tensor& query, const Tensor& key, const Tensor& value,
                        const Tensor& cos, const Tensor& sin, const Tensor& positions,
                        const Tensor& key_cache, const Tensor& value_cache,
                        const Tensor& block_table, const Tensor& cache_seqlens,
                        const Tensor& cu_seqlens) {
  const Checks check("rotary_kv_append");
  check_rotary(check, query, key, cos, sin, positions);
  check_append(check, key, value, key_cache, value_cache, block_table, cache_seqlens, cu_seqlens);
  const DenseTable table(check, query, cos, sin, positions);
  const DenseLanes lanes(check, key_cache, key.size(0), block_table, cache_seqlens, cu_seqlens);

  const Tensor rows_q = dense_inner(query, 1), rows_k = dense_inner(key, 1),
               rows_v = dense_inner(value, 1);
  Tensor query_out = new_like(query);
  cpu::rotary_kv_append({.query = heads_of(rows_q),
                         .key = heads_of(rows_k),
                         .value = heads_of(rows_v),
                         .query_out = query_out.mutable_data_ptr(),
                         .table = table.view(),
                         .key_cache = blocks_of(key_cache),
                         .value_cache = blocks_of(value_cache),
                         .lanes = lanes.view(),
                         .tokens = query.size(0),
                         .head_dim = query.size(2),
                         .dtype = dtype_of(query)});
  return query_out;
}

}  // namespace
}  // namespace mor

STABLE_TORCH_LIBRARY_IMPL(mor, CPU, m) {
  m.impl("rotary", TORCH_BOX(&mor::rotary));
  m.impl("kv_append", TORCH_BOX(&mor::kv_append));
  m.impl("rotary_kv_append", TORCH_BOX(&mor::rotary_kv_append));
}
