// CPU kernels of the kv_cache family.
#include <algorithm>

#include "common/parallel.h"
#include "common/vec.h"
#include "kv_cache/params.h"

namespace mor::MOR_ISA {
namespace {

int64_t grain_of(int64_t token_bytes) {
  return 1 + 65536 / (token_bytes + 1);
}

// out = [x1 * cos - x2 * sin, x2 * cos + x1 * sin], where x1 and x2 are the halves of x.
template <typename T, typename A = accumulate_t<T>>
void rotate_head(const T* x, const A* cos, const A* sin, T* out, int64_t half) {
  const auto rotate = [&](int64_t i, auto lanes) {
    const vec_t<A> x1 = load_lanes(x + i, lanes), x2 = load_lanes(x + half + i, lanes);
    const vec_t<A> c = load_lanes(cos + i, lanes), s = load_lanes(sin + i, lanes);
    store_lanes(out + i, x1 * c - x2 * s, lanes);
    store_lanes(out + half + i, x2 * c + x1 * s, lanes);
  };
  constexpr int64_t kWhole = kLanes<A>;
  if (half < kWhole) {
    return rotate(0, half);
  }
  // The last vector may overlap the one before: x and out are distinct, so it repeats the result.
  for (int64_t i = 0; i < half; i += kWhole) {
    rotate(std::min(i, half - kWhole), std::integral_constant<int64_t, kWhole>{});
  }
}

// Rotates the heads of one token; out is [heads, head_dim].
template <typename T, typename A = accumulate_t<T>>
void rotate_token(const Heads& x, const RotaryTable& table, int64_t token, T* out,
                  int64_t head_dim) {
  const int64_t position = table.positions[token];
  const A* cos = static_cast<const A*>(table.cos) + position * table.cos_stride;
  const A* sin = static_cast<const A*>(table.sin) + position * table.sin_stride;
  const T* head = static_cast<const T*>(x.data) + token * x.token_stride;
  for (int64_t h = 0; h < x.heads; ++h) {
    rotate_head(head + h * x.head_stride, cos, sin, out + h * head_dim, head_dim / 2);
  }
}

// Copies the heads of one token; out is [heads, head_dim].
void copy_token(const Heads& x, int64_t token, char* out, int64_t head_dim, int64_t element_bytes) {
  const int64_t bytes = head_dim * element_bytes;
  const char* head = static_cast<const char*>(x.data) + token * x.token_stride * element_bytes;
  for (int64_t h = 0; h < x.heads; ++h) {
    std::memcpy(out + h * bytes, head + h * x.head_stride * element_bytes,
                static_cast<size_t>(bytes));
  }
}

struct Slot {
  int64_t block, entry;

  // The place of this slot's entry, in elements from the cache's start.
  int64_t offset(const CacheBlocks& cache) const {
    return block * cache.block_stride + entry * cache.entry_stride;
  }
};

// Calls f(token, slot) for the tokens [begin, end).
template <typename F>
void for_each_slot(const Lanes& p, int64_t begin, int64_t end, F&& f) {
  const int32_t* next = p.cu_seqlens;  // where the token's lane ends
  while (*next <= begin) {
    ++next;
  }
  for (int64_t token = begin; token < end; ++token) {
    while (*next <= token) {
      ++next;
    }
    const int64_t lane = next - p.cu_seqlens - 1;
    const int64_t entry = p.cache_seqlens[lane] + token - p.cu_seqlens[lane];
    const int64_t block = p.block_table[lane * p.max_blocks + entry / p.block_size];
    f(token, Slot{block, entry % p.block_size});
  }
}

}  // namespace

void rotary(const RotaryParams& p) {
  dispatch_dtype(p.dtype, [&]<typename T>() {
    const int64_t query_size = p.query.heads * p.head_dim, key_size = p.key.heads * p.head_dim;
    const int64_t grain = grain_of((query_size + key_size) * static_cast<int64_t>(sizeof(T)));
    parallel_for(p.tokens, grain, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        rotate_token(p.query, p.table, t, static_cast<T*>(p.query_out) + t * query_size,
                     p.head_dim);
        rotate_token(p.key, p.table, t, static_cast<T*>(p.key_out) + t * key_size, p.head_dim);
      }
    });
  });
}

void kv_append(const KvAppendParams& p) {
  const int64_t size = p.element_bytes;
  const int64_t grain = grain_of((p.key.heads + p.value.heads) * p.head_dim * size);
  parallel_for(p.tokens, grain, [&](int64_t begin, int64_t end) {
    for_each_slot(p.lanes, begin, end, [&](int64_t t, Slot slot) {
      auto* key = static_cast<char*>(p.key_cache.data) + slot.offset(p.key_cache) * size;
      auto* value = static_cast<char*>(p.value_cache.data) + slot.offset(p.value_cache) * size;
      copy_token(p.key, t, key, p.head_dim, size);
      copy_token(p.value, t, value, p.head_dim, size);
    });
  });
}

void rotary_kv_append(const RotaryKvAppendParams& p) {
  dispatch_dtype(p.dtype, [&]<typename T>() {
    const int64_t query_size = p.query.heads * p.head_dim;
    const int64_t token_size = query_size + (p.key.heads + p.value.heads) * p.head_dim;
    const int64_t grain = grain_of(token_size * static_cast<int64_t>(sizeof(T)));
    parallel_for(p.tokens, grain, [&](int64_t begin, int64_t end) {
      for_each_slot(p.lanes, begin, end, [&](int64_t t, Slot slot) {
        T* key = static_cast<T*>(p.key_cache.data) + slot.offset(p.key_cache);
        T* value = static_cast<T*>(p.value_cache.data) + slot.offset(p.value_cache);
        rotate_token(p.query, p.table, t, static_cast<T*>(p.query_out) + t * query_size,
                     p.head_dim);
        rotate_token(p.key, p.table, t, key, p.head_dim);
        copy_token(p.value, t, reinterpret_cast<char*>(value), p.head_dim, sizeof(T));
      });
    });
  });
}

}  // namespace mor::MOR_ISA
