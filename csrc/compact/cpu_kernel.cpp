// CPU kernels of the compact family: compaction, gather and scatter of rows.
#include <algorithm>

#include "common/parallel.h"
#include "common/vec.h"
#include "compact/params.h"

namespace mor::MOR_ISA {
namespace {

// Rows that a thread takes at least: some 64 KiB of them.
int64_t row_grain(int64_t row_bytes) {
  return 1 + 65536 / (row_bytes + 1);
}

template <typename T>
accumulate_t<T> gate_at(const Gate& gate, int64_t i) {
  if (gate.data == nullptr) {
    return 1;
  }
  if (gate.dtype == DType::kFloat32) {
    return static_cast<const float*>(gate.data)[i];
  }
  return load_scalar(static_cast<const T*>(gate.data) + i);
}

// out = x + factor * update; out may be x.
template <typename T>
void add_scaled(T* out, const T* x, const T* update, accumulate_t<T> factor, int64_t size) {
  for_each_vector<accumulate_t<T>>(size, [&](int64_t i, auto lanes) {
    store_lanes(out + i, load_lanes(x + i, lanes) + factor * load_lanes(update + i, lanes), lanes);
  });
}

template <typename T>
void zero_row(T* row, int64_t size) {
  std::memset(row, 0, static_cast<size_t>(size) * sizeof(T));
}

template <typename T>
void copy_row(T* to, const T* from, int64_t size) {
  std::memcpy(to, from, static_cast<size_t>(size) * sizeof(T));
}

template <typename T>
void gather_tokens_bwd_of(const GatherTokensBwdParams& p) {
  using A = accumulate_t<T>;
  const auto* grad = static_cast<const T*>(p.grad);
  const auto [first, next] = p.inverse;
  parallel_for(p.num_rows, row_grain(p.row_size * sizeof(T)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* out = static_cast<T*>(p.grad_x) + row * p.row_size;
      const int32_t entry = first[row];
      if (entry < 0) {
        zero_row(out, p.row_size);
      } else if (next[entry] < 0) {
        copy_row(out, grad + entry * p.grad_stride, p.row_size);
      } else {
        for_each_vector<A>(p.row_size, [&](int64_t i, auto lanes) {
          vec_t<A> sum{};
          for (int32_t e = entry; e >= 0; e = next[e]) {
            sum += load_lanes(grad + e * p.grad_stride + i, lanes);
          }
          store_lanes(out + i, sum, lanes);
        });
      }
    }
  });
}

template <typename T>
void scatter_tokens_of(const ScatterTokensParams& p) {
  parallel_for(p.num_rows, row_grain(p.row_size * sizeof(T)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* out = static_cast<T*>(p.out) + row * p.row_size;
      const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
      const int32_t entry = p.source[row];
      if (entry < 0) {
        copy_row(out, x, p.row_size);
      } else {
        const T* update = static_cast<const T*>(p.update) + entry * p.update_stride;
        add_scaled(out, x, update, gate_at<T>(p.gate, entry), p.row_size);
      }
    }
  });
}

template <typename T>
void scatter_tokens_inplace_of(const ScatterTokensInplaceParams& p) {
  parallel_for(p.count, row_grain(p.row_size * sizeof(T)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (p.index[i] >= 0) {
        T* x = static_cast<T*>(p.x) + p.index[i] * p.x_stride;
        const T* update = static_cast<const T*>(p.update) + i * p.update_stride;
        add_scaled(x, x, update, gate_at<T>(p.gate, i), p.row_size);
      }
    }
  });
}

// Gradients of one entry: grad_update = gate * grad, returned is the dot product grad * update.
template <typename T>
accumulate_t<T> scatter_row_bwd(const T* grad, const T* update, accumulate_t<T> gate,
                                T* grad_update, int64_t size) {
  using A = accumulate_t<T>;
  vec_t<A> dot{};
  for_each_vector<A>(size, [&](int64_t i, auto lanes) {
    const vec_t<A> g = load_lanes(grad + i, lanes);
    store_lanes(grad_update + i, gate * g, lanes);
    if (update != nullptr) {
      dot += g * load_lanes(update + i, lanes);
    }
  });
  return sum_lanes<A>(dot);
}

template <typename T>
void scatter_tokens_bwd_of(const ScatterTokensBwdParams& p) {
  parallel_for(p.count, row_grain(p.row_size * sizeof(T)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* grad_update = static_cast<T*>(p.grad_update) + i * p.row_size;
      accumulate_t<T> grad_gate = 0;
      if (p.index[i] < 0) {
        zero_row(grad_update, p.row_size);
      } else {
        const T* grad = static_cast<const T*>(p.grad) + p.index[i] * p.grad_stride;
        const T* update =
            p.update ? static_cast<const T*>(p.update) + i * p.update_stride : nullptr;
        grad_gate = scatter_row_bwd(grad, update, gate_at<T>(p.gate, i), grad_update, p.row_size);
      }
      if (p.update == nullptr) {
        continue;
      }
      if (p.gate.dtype == DType::kFloat32) {
        static_cast<float*>(p.grad_gate)[i] = static_cast<float>(grad_gate);
      } else {
        store_scalar(static_cast<T*>(p.grad_gate) + i, grad_gate);
      }
    }
  });
}

// The rows with depth > r, ascending, then -1; and how many there are up to each sequence's end.
void compact_one_depth(const CompactDepthParams& p, int32_t r) {
  int32_t* index = p.index + r * p.rows;
  int32_t* cu_seqlens_out = p.cu_seqlens_out + r * (p.batch + 1);
  int32_t count = 0;
  cu_seqlens_out[0] = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int32_t row = p.cu_seqlens[b]; row < p.cu_seqlens[b + 1]; ++row) {
      index[count] = row;  // stays if the row is active, else the next one overwrites it
      count += p.depth[row] > r;
    }
    cu_seqlens_out[b + 1] = count;
  }
  std::fill(index + count, index + p.rows, -1);
}

}  // namespace

void compact_depth(const CompactDepthParams& p) {
  parallel_for(p.recursions, 1 + 16384 / (p.rows + 1), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      compact_one_depth(p, static_cast<int32_t>(r));
    }
  });
}

void gather_tokens(const GatherTokensParams& p) {
  const int64_t row_bytes = p.row_size * p.element_bytes;
  const bool stream = p.count * row_bytes > kStreamBytes;
  const auto* x = static_cast<const char*>(p.x);
  auto* out = static_cast<char*>(p.out);
  parallel_for(p.count, row_grain(row_bytes), [&](int64_t begin, int64_t end) {
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

void gather_tokens_bwd(const GatherTokensBwdParams& p) {
  dispatch_dtype(p.dtype, [&]<typename T>() { gather_tokens_bwd_of<T>(p); });
}

void scatter_tokens(const ScatterTokensParams& p) {
  dispatch_dtype(p.dtype, [&]<typename T>() { scatter_tokens_of<T>(p); });
}

void scatter_tokens_(const ScatterTokensInplaceParams& p) {
  dispatch_dtype(p.dtype, [&]<typename T>() { scatter_tokens_inplace_of<T>(p); });
}

void scatter_tokens_bwd(const ScatterTokensBwdParams& p) {
  dispatch_dtype(p.dtype, [&]<typename T>() { scatter_tokens_bwd_of<T>(p); });
}

}  // namespace mor::MOR_ISA
