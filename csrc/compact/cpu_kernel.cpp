// CPU kernels of the compact family: compaction, gather and scatter of rows.
#include <algorithm>

#include "common/parallel.h"
#include "common/vec.h"
#include "compact/cpu_rows.h"
#include "compact/params.h"

namespace mor::MOR_ISA {
namespace {

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

// Rows of one element, E by its size.
template <typename E>
void gather_elements(const GatherTokensParams& p) {
  parallel_for(p.count, row_grain(sizeof(E)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int32_t row = p.index[i];
      static_cast<E*>(p.out)[i] = row < 0 ? E{} : static_cast<const E*>(p.x)[row * p.row_stride];
    }
  });
}

void gather_rows(const GatherTokensParams& p) {
  const int64_t row_bytes = p.row_size * p.element_bytes;
  const int64_t stride_bytes = p.row_stride * p.element_bytes;
  const RowWriter writer(p.count * row_bytes);
  parallel_for(p.count, row_grain(row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      char* out = static_cast<char*>(p.out) + i * row_bytes;
      if (p.index[i] < 0) {
        writer.zero(out, row_bytes);
      } else {
        writer.copy(out, static_cast<const char*>(p.x) + p.index[i] * stride_bytes, row_bytes);
      }
    }
    writer.finish();
  });
}

template <typename T>
void gather_tokens_bwd_of(const GatherTokensBwdParams& p) {
  using A = accumulate_t<T>;
  const int64_t row_bytes = p.row_size * static_cast<int64_t>(sizeof(T));
  const auto* grad = static_cast<const T*>(p.grad);
  const int32_t *first = p.inverse.first, *next = p.inverse.next;
  const RowWriter writer(p.inverse.num_rows * row_bytes);
  parallel_for(p.inverse.num_rows, row_grain(row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* out = static_cast<T*>(p.grad_x) + row * p.row_size;
      const int32_t entry = first[row];
      if (entry < 0) {
        writer.zero(out, p.row_size);
      } else if (next[entry] < 0) {
        writer.copy(out, grad + entry * p.grad_stride, p.row_size);
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
    writer.finish();
  });
}

template <typename T>
void scatter_tokens_of(const ScatterTokensParams& p) {
  const int64_t row_bytes = p.row_size * static_cast<int64_t>(sizeof(T));
  const RowWriter writer(p.inverse.num_rows * row_bytes);
  parallel_for(p.inverse.num_rows, row_grain(row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* out = static_cast<T*>(p.out) + row * p.row_size;
      const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
      const int32_t entry = p.inverse.first[row];
      if (entry < 0) {
        writer.copy(out, x, p.row_size);
        continue;
      }
      const T* update = static_cast<const T*>(p.update) + entry * p.update_stride;
      const accumulate_t<T> gate = gate_at<T>(p.gate, entry);
      writer.compute(out, p.row_size, [&](T* to, int64_t i, int64_t count) {
        add_scaled(to, x + i, update + i, gate, count);
      });
    }
    writer.finish();
  });
}

template <typename T>
void scatter_tokens_inplace_of(const ScatterTokensInplaceParams& p) {
  const int64_t row_bytes = p.row_size * static_cast<int64_t>(sizeof(T));
  parallel_for(p.count, row_grain(row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (p.index[i] >= 0) {
        T* x = static_cast<T*>(p.x) + p.index[i] * p.x_stride;
        const T* update = static_cast<const T*>(p.update) + i * p.update_stride;
        add_scaled(x, x, update, gate_at<T>(p.gate, i), p.row_size);
      }
    }
  });
}

template <typename T>
void scale(T* out, const T* x, accumulate_t<T> factor, int64_t size) {
  for_each_vector<accumulate_t<T>>(size, [&](int64_t i, auto lanes) {
    store_lanes(out + i, factor * load_lanes(x + i, lanes), lanes);
  });
}

template <typename T>
accumulate_t<T> dot(const T* a, const T* b, int64_t size) {
  return sum_row<accumulate_t<T>>(size, [&](int64_t i, auto lanes) {
    return load_lanes(a + i, lanes) * load_lanes(b + i, lanes);
  });
}

template <typename T>
void store_grad_gate(const ScatterTokensBwdParams& p, int64_t i, accumulate_t<T> value) {
  if (p.gate.dtype == DType::kFloat32) {
    static_cast<float*>(p.grad_gate)[i] = static_cast<float>(value);
  } else {
    store_scalar(static_cast<T*>(p.grad_gate) + i, value);
  }
}

template <typename T>
void scatter_tokens_bwd_of(const ScatterTokensBwdParams& p) {
  const int64_t row_bytes = p.row_size * static_cast<int64_t>(sizeof(T));
  const RowWriter writer(p.count * row_bytes);
  parallel_for(p.count, row_grain(row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* grad_update = static_cast<T*>(p.grad_update) + i * p.row_size;
      accumulate_t<T> grad_gate = 0;
      if (p.index[i] < 0) {
        writer.zero(grad_update, p.row_size);
      } else {
        const T* grad = static_cast<const T*>(p.grad) + p.index[i] * p.grad_stride;
        const accumulate_t<T> gate = gate_at<T>(p.gate, i);
        writer.compute(grad_update, p.row_size, [&](T* to, int64_t begin, int64_t count) {
          scale(to, grad + begin, gate, count);
        });
        if (p.update != nullptr) {
          const T* update = static_cast<const T*>(p.update) + i * p.update_stride;
          grad_gate = dot(grad, update, p.row_size);
        }
      }
      if (p.update != nullptr) {
        store_grad_gate<T>(p, i, grad_gate);
      }
    }
    writer.finish();
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
  if (p.row_size != 1) {
    return gather_rows(p);
  }
  switch (p.element_bytes) {
    case 2:
      return gather_elements<uint16_t>(p);
    case 4:
      return gather_elements<uint32_t>(p);
    default:
      return gather_elements<uint64_t>(p);
  }
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
