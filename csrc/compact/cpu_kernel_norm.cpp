// CPU kernels of gather_rms_norm and its backward.
#include <algorithm>

#include "common/parallel.h"
#include "common/vec.h"
#include "compact/cpu_rows.h"
#include "compact/params.h"

namespace mor::MOR_ISA {
namespace {

// T: storage type of the rows; W: that of the weight, T or float.
template <typename T, typename W>
struct RmsNorm {
  using A = accumulate_t<T>;

  static vec_t<A> load_weight(const W* from, auto lanes) {
    if constexpr (std::is_same_v<accumulate_t<W>, A>) {
      return load_lanes(from, lanes);
    } else {  // fp32 weight of fp64 rows
      vec_t<A> wide{};
      for (int i = 0; i < static_cast<int>(lanes); ++i) {
        wide[i] = from[i];
      }
      return wide;
    }
  }

  static void store_weight(W* to, vec_t<A> x, auto lanes) {
    if constexpr (std::is_same_v<accumulate_t<W>, A>) {
      store_lanes(to, x, lanes);
    } else {
      for (int i = 0; i < static_cast<int>(lanes); ++i) {
        to[i] = static_cast<W>(x[i]);
      }
    }
  }

  static void forward(const GatherRmsNormParams& p) {
    const int64_t size = p.row_size, row_bytes = size * static_cast<int64_t>(sizeof(T));
    const RowWriter writer(p.count * row_bytes);
    parallel_for(p.count, row_grain(row_bytes), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        T* row = static_cast<T*>(p.rows) + i * size;
        T* normed = static_cast<T*>(p.normed) + i * size;
        A rstd = 0;
        if (p.index[i] < 0) {
          writer.zero(row, size);
          writer.zero(normed, size);
        } else {
          const T* x = static_cast<const T*>(p.x) + p.index[i] * p.x_stride;
          rstd = reciprocal_rms(x, p.eps, size);
          writer.copy(row, x, size);
          writer.compute(normed, size, [&](T* to, int64_t begin, int64_t count) {
            scale(to, x + begin, rstd, static_cast<const W*>(p.weight) + begin, count);
          });
        }
        static_cast<A*>(p.rstd)[i] = rstd;
      }
      writer.finish();
    });
  }

  static A reciprocal_rms(const T* x, double eps, int64_t size) {
    const A squares = sum_row<A>(size, [&](int64_t i, auto lanes) {
      const vec_t<A> v = load_lanes(x + i, lanes);
      return v * v;
    });
    return A{1} / std::sqrt(squares / static_cast<A>(size) + static_cast<A>(eps));
  }

  static void scale(T* out, const T* x, A factor, const W* weight, int64_t size) {
    for_each_vector<A>(size, [&](int64_t i, auto lanes) {
      store_lanes(out + i, load_lanes(x + i, lanes) * factor * load_weight(weight + i, lanes),
                  lanes);
    });
  }

  // Adds the entry's share to grad_weight and hands its share of grad_x to
  // sink(offset, value, lanes).
  template <typename Sink>
  static void backward_entry(const GatherRmsNormBwdParams& p, int64_t entry, A* grad_weight,
                             Sink&& sink) {
    const int64_t size = p.row_size, offset = entry * size;
    const T* grad_rows = p.grad_rows ? static_cast<const T*>(p.grad_rows) + offset : nullptr;
    const T* row = static_cast<const T*>(p.rows) + offset;
    const W* weight = static_cast<const W*>(p.weight);
    if (p.grad_normed == nullptr) {
      for_each_vector<A>(size, [&](int64_t i, auto lanes) {
        sink(i, grad_rows ? load_lanes(grad_rows + i, lanes) : vec_t<A>{}, lanes);
      });
      return;
    }
    const T* grad_normed = static_cast<const T*>(p.grad_normed) + offset;
    const A rstd = static_cast<const A*>(p.rstd)[entry];
    const A dot = sum_row<A>(size, [&](int64_t i, auto lanes) {
      const vec_t<A> share = load_lanes(grad_normed + i, lanes) * load_lanes(row + i, lanes) * rstd;
      store_lanes(grad_weight + i, load_lanes(grad_weight + i, lanes) + share, lanes);
      return share * load_weight(weight + i, lanes);
    });
    const A along_row = dot / static_cast<A>(size) * rstd;
    for_each_vector<A>(size, [&](int64_t i, auto lanes) {
      const vec_t<A> upstream = load_lanes(grad_normed + i, lanes) * load_weight(weight + i, lanes);
      vec_t<A> value = rstd * (upstream - along_row * load_lanes(row + i, lanes));
      if (grad_rows != nullptr) {
        value += load_lanes(grad_rows + i, lanes);
      }
      sink(i, value, lanes);
    });
  }

  static void backward_row(const GatherRmsNormBwdParams& p, int64_t row, A* grad_weight, A* sum) {
    T* out = static_cast<T*>(p.grad_x) + row * p.row_size;
    const int32_t *first = p.inverse.first, *next = p.inverse.next;
    const int32_t entry = first[row];
    if (entry < 0) {
      std::memset(out, 0, static_cast<size_t>(p.row_size) * sizeof(T));
    } else if (next[entry] < 0) {
      backward_entry(p, entry, grad_weight, [&](int64_t i, vec_t<A> value, auto lanes) {
        store_lanes(out + i, value, lanes);
      });
    } else {
      std::fill_n(sum, p.row_size, A{0});
      for (int32_t e = entry; e >= 0; e = next[e]) {
        backward_entry(p, e, grad_weight, [&](int64_t i, vec_t<A> value, auto lanes) {
          store_lanes(sum + i, load_lanes(sum + i, lanes) + value, lanes);
        });
      }
      for_each_vector<A>(p.row_size, [&](int64_t i, auto lanes) {
        store_lanes(out + i, load_lanes(sum + i, lanes), lanes);
      });
    }
  }

  static void backward(const GatherRmsNormBwdParams& p) {
    auto* scratch = static_cast<A*>(p.scratch);
    parallel_tasks(p.blocks, [&](int64_t block, int64_t) {
      A* grad_weight = scratch + block * 2 * p.row_size;
      std::fill_n(grad_weight, p.row_size, A{0});
      const int64_t end = (block + 1) * p.inverse.num_rows / p.blocks;
      for (int64_t row = block * p.inverse.num_rows / p.blocks; row < end; ++row) {
        backward_row(p, row, grad_weight, grad_weight + p.row_size);
      }
    });
    for_each_vector<A>(p.row_size, [&](int64_t i, auto lanes) {
      vec_t<A> sum{};
      for (int64_t block = 0; block < p.blocks; ++block) {
        sum += load_lanes(scratch + block * 2 * p.row_size + i, lanes);
      }
      store_weight(static_cast<W*>(p.grad_weight) + i, sum, lanes);
    });
  }
};

template <typename F>
void dispatch(DType dtype, DType weight_dtype, F&& f) {
  dispatch_dtype(dtype, [&]<typename T>() {
    if (weight_dtype == dtype) {
      f(RmsNorm<T, T>{});
    } else {
      f(RmsNorm<T, float>{});
    }
  });
}

}  // namespace

void gather_rms_norm(const GatherRmsNormParams& p) {
  dispatch(p.dtype, p.weight_dtype, [&](auto norm) { norm.forward(p); });
}

void gather_rms_norm_bwd(const GatherRmsNormBwdParams& p) {
  dispatch(p.dtype, p.weight_dtype, [&](auto norm) { norm.backward(p); });
}

}  // namespace mor::MOR_ISA
