// What the host sides of the compact family share: argument checks, and for each op a Call: its
// checked arguments, its results, and the Params that the kernels of a device take. Also the CPU
// kernels' declarations.
#pragma once

#include <algorithm>

#include "common/cpu_isa.h"
#include "compact/params.h"
#include "torch_abi.h"

namespace mor {

MOR_DECLARE_CPU_KERNEL(compact_depth, CompactDepthParams)
MOR_DECLARE_CPU_KERNEL(gather_tokens, GatherTokensParams)
MOR_DECLARE_CPU_KERNEL(gather_tokens_bwd, GatherTokensBwdParams)
MOR_DECLARE_CPU_KERNEL(scatter_tokens, ScatterTokensParams)
MOR_DECLARE_CPU_KERNEL(scatter_tokens_, ScatterTokensInplaceParams)
MOR_DECLARE_CPU_KERNEL(scatter_tokens_bwd, ScatterTokensBwdParams)
MOR_DECLARE_CPU_KERNEL(gather_rms_norm, GatherRmsNormParams)
MOR_DECLARE_CPU_KERNEL(gather_rms_norm_bwd, GatherRmsNormBwdParams)

// Rows are named by int32.
inline constexpr int64_t kMaxRows = std::numeric_limits<int32_t>::max();

// Far above any model; keeps a wrong number from asking for all memory.
inline constexpr int64_t kMaxRecursions = 1024;

// ---- rows ----

inline void check_rows(const Checks& check, const char* argument, const Tensor& x) {
  check.floating(argument, x);
  check.require(x.dim() >= 1, argument, "of shape [N, ...]", shape_str(x));
  check.require(x.size(0) <= kMaxRows, argument, "of fewer than 2^31 rows", x.size(0));
}

// tensor is [count, ...] with the dtype and the row shape of x.
inline void check_rows_like(const Checks& check, const char* argument, const Tensor& tensor,
                            int64_t count, const Tensor& x) {
  check.same_device(argument, tensor, x);
  check.dtype(argument, tensor, x.scalar_type());
  bool ok = tensor.dim() == x.dim() && tensor.size(0) == count;
  for (int64_t d = 1; ok && d < x.dim(); ++d) {
    ok = tensor.size(d) == x.size(d);
  }
  if (!ok) {
    std::string rule = str("of shape [", count);
    for (int64_t d = 1; d < x.dim(); ++d) {
      rule += str(", ", x.size(d));
    }
    check.fail(argument, rule + "]", shape_str(tensor));
  }
}

inline void check_num_rows(const Checks& check, int64_t num_rows) {
  check.require(num_rows >= 0 && num_rows <= kMaxRows, "num_rows", "in [0, 2^31)", num_rows);
}

inline int64_t row_size_of(const Tensor& x) {
  int64_t size = 1;
  for (int64_t d = 1; d < x.dim(); ++d) {
    size *= x.size(d);
  }
  return size;
}

inline Tensor new_rows_like(const Tensor& x, int64_t count) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes[0] = count;
  return new_tensor(x, sizes);
}

// ---- index, its inverse, gate, weight ----

// A checked index, contiguous.
struct Index {
  Index() = default;
  Index(const Checks& check, const Tensor& tensor, const Tensor& like, int64_t num_rows) {
    check.indices("index", tensor, like, {-1}, "[K]");
    storage = dense(tensor);
    data = storage.const_data_ptr<int32_t>();
    count = tensor.numel();
    if (const Readable values(storage); values) {
      check.within("index", values.data(), count, -1, num_rows);
    }
  }

  Tensor storage;
  const int32_t* data = nullptr;
  int64_t count = 0;
};

// Memory for the inverse of an index.
struct Inverse {
  Inverse() = default;
  Inverse(const Index& index, int64_t num_rows) {
    storage = new_tensor(index.storage, {num_rows + 1 + index.count});
    auto* first = storage.mutable_data_ptr<int32_t>();
    lists = {index.data, first, first + num_rows + 1, num_rows, index.count};
  }

  Tensor storage;
  InverseIndex lists{};
};

// On the host.
inline void fill_inverse(const InverseIndex& lists) {
  std::fill_n(lists.first, lists.num_rows, -1);
  for (int64_t i = lists.count - 1; i >= 0; --i) {
    if (lists.index[i] >= 0) {
      lists.next[i] = lists.first[lists.index[i]];
      lists.first[lists.index[i]] = static_cast<int32_t>(i);
    }
  }
}

inline bool strictly_ascending(const Readable& index) {
  int32_t last = -1;
  for (int64_t i = 0; i < index.count(); ++i) {
    if (index[i] >= 0) {
      if (index[i] <= last) {
        return false;
      }
      last = index[i];
    }
  }
  return true;
}

inline void check_unique(const Checks& check, const Index& index, int64_t num_rows) {
  const Readable values(index.storage);
  if (!values || strictly_ascending(values)) {
    return;
  }
  std::vector<int32_t> first(static_cast<size_t>(num_rows)), next(values.count(), -1);
  fill_inverse({values.data(), first.data(), next.data(), num_rows, index.count});
  for (int64_t i = 0; i < index.count; ++i) {
    if (next[i] >= 0) {
      check.fail("index", "unique (-1 aside)",
                 str(values[i], " at elements ", i, " and ", next[i]));
    }
  }
}

// A checked gate, contiguous; no data if there is none.
struct DenseGate {
  DenseGate() = default;
  DenseGate(const Checks& check, const std::optional<Tensor>& tensor, int64_t count,
            const Tensor& x) {
    if (tensor) {
      check.same_device("gate", *tensor, x);
      check.factor_dtype("gate", *tensor, x);
      check.shape("gate", *tensor, {count}, "[K]");
      storage = dense(*tensor);
      gate = {storage.const_data_ptr(), dtype_of(*tensor)};
    }
  }

  Tensor storage;
  Gate gate{nullptr, DType::kFloat32};
};

inline void check_weight(const Checks& check, const Tensor& weight, const Tensor& rows) {
  check.same_device("weight", weight, rows);
  check.factor_dtype("weight", weight, rows);
  check.shape("weight", weight, {rows.size(1)}, "[hidden]");
}

// ---- tensors that are written in place ----

// Whether elements of the tensor may share memory.
inline bool overlapping(const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    dims.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;  // offset of the last element, as far as the dimensions are gone through
  for (const auto& [stride, size] : dims) {
    if (size > 1 && stride <= reach) {
      return true;
    }
    reach += (size - 1) * stride;
  }
  return false;
}

// The bytes from a tensor's first element to its last.
inline std::pair<const char*, const char*> extent(const Tensor& tensor) {
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    last += (tensor.size(d) - 1) * tensor.stride(d);
  }
  const auto* begin = static_cast<const char*>(tensor.const_data_ptr());
  return {begin, begin + (last + 1) * static_cast<int64_t>(tensor.element_size())};
}

// The tensor itself, or a copy if writing to target could change it.
inline Tensor unaliased(const Tensor& tensor, const Tensor& target) {
  if (tensor.numel() == 0 || target.numel() == 0) {
    return tensor;
  }
  const auto [begin, end] = extent(tensor);
  const auto [target_begin, target_end] = extent(target);
  return begin < target_end && target_begin < end ? torch::stable::clone(tensor) : tensor;
}

// ---- calls: everything is checked before anything is allocated ----

struct CompactDepthCall {
  CompactDepthCall(const Checks& check, const Tensor& depth_, const Tensor& cu_seqlens_,
                   int64_t num_recursions) {
    check.indices("depth", depth_, depth_, {-1}, "[N]");
    check.indices("cu_seqlens", cu_seqlens_, depth_, {-1}, "[batch + 1]");
    check.require(cu_seqlens_.numel() > 0, "cu_seqlens", "of shape [batch + 1]",
                  shape_str(cu_seqlens_));
    check.require(num_recursions >= 1 && num_recursions <= kMaxRecursions, "num_recursions",
                  str("in [1, ", kMaxRecursions, "]"), num_recursions);
    const int64_t rows = depth_.numel(), batch = cu_seqlens_.numel() - 1;
    check.require(rows <= kMaxRows, "depth", "of fewer than 2^31 elements", rows);
    depth = dense(depth_);
    cu_seqlens = dense(cu_seqlens_);
    if (const Readable lengths(cu_seqlens); lengths) {
      check.cumulative("cu_seqlens", lengths.data(), batch, rows);
    }
    if (const Readable depths(depth); depths) {
      check.within("depth", depths.data(), rows, 0, num_recursions + 1);
    }
    index = new_tensor(depth, {num_recursions, rows});
    cu_seqlens_out = new_tensor(depth, {num_recursions, batch + 1});
    params = {.depth = depth.const_data_ptr<int32_t>(),
              .cu_seqlens = cu_seqlens.const_data_ptr<int32_t>(),
              .index = index.mutable_data_ptr<int32_t>(),
              .cu_seqlens_out = cu_seqlens_out.mutable_data_ptr<int32_t>(),
              .rows = rows,
              .batch = batch,
              .recursions = num_recursions};
  }

  Tensor depth, cu_seqlens, index, cu_seqlens_out;
  CompactDepthParams params;
};

struct GatherTokensCall {
  GatherTokensCall(const Checks& check, const Tensor& x, const Tensor& index_) {
    check_rows(check, "x", x);
    index = Index(check, index_, x, x.size(0));
    source = dense_inner(x, x.dim() - 1);
    out = new_rows_like(x, index.count);
    params = {.x = source.const_data_ptr(),
              .index = index.data,
              .out = out.mutable_data_ptr(),
              .num_rows = x.size(0),
              .count = index.count,
              .row_size = row_size_of(x),
              .row_stride = source.stride(0),
              .element_bytes = static_cast<int64_t>(x.element_size())};
  }

  Index index;
  Tensor source, out;
  GatherTokensParams params;
};

struct GatherTokensBwdCall {
  GatherTokensBwdCall(const Checks& check, const Tensor& grad, const Tensor& index_,
                      int64_t num_rows) {
    check_rows(check, "grad", grad);
    check_num_rows(check, num_rows);
    index = Index(check, index_, grad, num_rows);
    check.require(grad.size(0) == index.count, "grad", "of shape [K, ...]", shape_str(grad));
    source = dense_inner(grad, grad.dim() - 1);
    inverse = Inverse(index, num_rows);
    grad_x = new_rows_like(grad, num_rows);
    params = {.grad = source.const_data_ptr(),
              .inverse = inverse.lists,
              .grad_x = grad_x.mutable_data_ptr(),
              .row_size = row_size_of(grad),
              .grad_stride = source.stride(0),
              .dtype = dtype_of(grad)};
  }

  Index index;
  Inverse inverse;
  Tensor source, grad_x;
  GatherTokensBwdParams params;
};

struct ScatterTokensCall {
  ScatterTokensCall(const Checks& check, const Tensor& x, const Tensor& update_,
                    const Tensor& index_, const std::optional<Tensor>& gate_) {
    check_rows(check, "x", x);
    index = Index(check, index_, x, x.size(0));
    check_rows_like(check, "update", update_, index.count, x);
    gate = DenseGate(check, gate_, index.count, x);
    check_unique(check, index, x.size(0));
    source = dense_inner(x, x.dim() - 1);
    update = dense_inner(update_, x.dim() - 1);
    inverse = Inverse(index, x.size(0));
    out = new_rows_like(x, x.size(0));
    params = {.x = source.const_data_ptr(),
              .update = update.const_data_ptr(),
              .gate = gate.gate,
              .inverse = inverse.lists,
              .out = out.mutable_data_ptr(),
              .row_size = row_size_of(x),
              .x_stride = source.stride(0),
              .update_stride = update.stride(0),
              .dtype = dtype_of(x)};
  }

  Index index;
  DenseGate gate;
  Inverse inverse;
  Tensor source, update, out;
  ScatterTokensParams params;
};

struct ScatterTokensInplaceCall {
  ScatterTokensInplaceCall(const Checks& check, const Tensor& x_, const Tensor& update_,
                           const Tensor& index_, const std::optional<Tensor>& gate_)
      : x(x_) {
    check_rows(check, "x", x);
    check.require(!overlapping(x), "x", "of elements that share no memory", "an expanded tensor");
    index = Index(check, index_, x, x.size(0));
    check_rows_like(check, "update", update_, index.count, x);
    gate = DenseGate(check, gate_, index.count, x);
    check_unique(check, index, x.size(0));
    // Rows whose elements are not dense are updated in a copy, which finish() copies back.
    target = dense_inner(x, x.dim() - 1);
    update = unaliased(dense_inner(update_, x.dim() - 1), x);
    if (gate_) {
      gate.storage = unaliased(gate.storage, x);
      gate.gate.data = gate.storage.const_data_ptr();
    }
    params = {.x = target.mutable_data_ptr(),
              .update = update.const_data_ptr(),
              .gate = gate.gate,
              .index = index.data,
              .num_rows = x.size(0),
              .count = index.count,
              .row_size = row_size_of(x),
              .x_stride = target.stride(0),
              .update_stride = update.stride(0),
              .dtype = dtype_of(x)};
  }

  void finish() {
    if (target.const_data_ptr() != x.const_data_ptr()) {
      torch::stable::copy_(x, target);
    }
  }

  Index index;
  DenseGate gate;
  Tensor x, target, update;
  ScatterTokensInplaceParams params;
};

struct ScatterTokensBwdCall {
  ScatterTokensBwdCall(const Checks& check, const Tensor& grad, const Tensor& index_,
                       const std::optional<Tensor>& update_, const std::optional<Tensor>& gate_) {
    check_rows(check, "grad", grad);
    index = Index(check, index_, grad, grad.size(0));
    gate = DenseGate(check, gate_, index.count, grad);
    if (update_) {
      check.require(gate_.has_value(), "gate", "given where update is", "None");
      check_rows_like(check, "update", *update_, index.count, grad);
      update = dense_inner(*update_, grad.dim() - 1);
    }
    source = dense_inner(grad, grad.dim() - 1);
    grad_update = new_rows_like(grad, index.count);
    grad_gate = new_tensor(gate_ ? *gate_ : grad, {update_ ? index.count : 0});
    params = {.grad = source.const_data_ptr(),
              .update = update_ ? update.const_data_ptr() : nullptr,
              .gate = gate.gate,
              .index = index.data,
              .grad_update = grad_update.mutable_data_ptr(),
              .grad_gate = grad_gate.mutable_data_ptr(),
              .num_rows = grad.size(0),
              .count = index.count,
              .row_size = row_size_of(grad),
              .grad_stride = source.stride(0),
              .update_stride = update_ ? update.stride(0) : 0,
              .dtype = dtype_of(grad)};
  }

  Index index;
  DenseGate gate;
  Tensor source, update, grad_update, grad_gate;
  ScatterTokensBwdParams params;
};

struct GatherRmsNormCall {
  GatherRmsNormCall(const Checks& check, const Tensor& x, const Tensor& index_,
                    const Tensor& weight_, double eps) {
    check_rows(check, "x", x);
    check.shape("x", x, {-1, -1}, "[N, hidden]");
    index = Index(check, index_, x, x.size(0));
    check_weight(check, weight_, x);
    check.require(eps >= 0, "eps", "at least 0", eps);
    source = dense_inner(x, 1);
    weight = dense(weight_);
    rows = new_rows_like(x, index.count);
    normed = new_rows_like(x, index.count);
    rstd = new_tensor(x, {index.count}, accumulate_dtype(x));
    params = {.x = source.const_data_ptr(),
              .index = index.data,
              .weight = weight.const_data_ptr(),
              .rows = rows.mutable_data_ptr(),
              .normed = normed.mutable_data_ptr(),
              .rstd = rstd.mutable_data_ptr(),
              .num_rows = x.size(0),
              .count = index.count,
              .row_size = x.size(1),
              .x_stride = source.stride(0),
              .eps = eps,
              .dtype = dtype_of(x),
              .weight_dtype = dtype_of(weight)};
  }

  Index index;
  Tensor source, weight, rows, normed, rstd;
  GatherRmsNormParams params;
};

struct GatherRmsNormBwdCall {
  GatherRmsNormBwdCall(const Checks& check, const std::optional<Tensor>& grad_rows_,
                       const std::optional<Tensor>& grad_normed_, const Tensor& rows_,
                       const Tensor& rstd_, const Tensor& index_, const Tensor& weight_,
                       int64_t num_rows) {
    check_rows(check, "rows", rows_);
    check.shape("rows", rows_, {-1, -1}, "[K, hidden]");
    const int64_t count = rows_.size(0), hidden = rows_.size(1);
    check_num_rows(check, num_rows);
    index = Index(check, index_, rows_, num_rows);
    check.require(index.count == count, "index", "of shape [K]", shape_str(index_));
    check.same_device("rstd", rstd_, rows_);
    check.dtype("rstd", rstd_, accumulate_dtype(rows_));
    check.shape("rstd", rstd_, {count}, "[K]");
    check_weight(check, weight_, rows_);
    const auto checked_grad = [&](const char* name, const std::optional<Tensor>& grad) {
      if (!grad) {
        return Tensor();
      }
      check_rows_like(check, name, *grad, count, rows_);
      return dense(*grad);
    };
    grad_rows = checked_grad("grad_rows", grad_rows_);
    grad_normed = checked_grad("grad_normed", grad_normed_);
    rows = dense(rows_);
    rstd = dense(rstd_);
    weight = dense(weight_);
    inverse = Inverse(index, num_rows);
    grad_x = new_rows_like(rows, num_rows);
    grad_weight = new_tensor(weight, {hidden});
    params = {.grad_rows = grad_rows_ ? grad_rows.const_data_ptr() : nullptr,
              .grad_normed = grad_normed_ ? grad_normed.const_data_ptr() : nullptr,
              .rows = rows.const_data_ptr(),
              .rstd = rstd.const_data_ptr(),
              .weight = weight.const_data_ptr(),
              .inverse = inverse.lists,
              .scratch = nullptr,
              .grad_x = grad_x.mutable_data_ptr(),
              .grad_weight = grad_weight.mutable_data_ptr(),
              .row_size = hidden,
              .blocks = 0,
              .dtype = dtype_of(rows),
              .weight_dtype = dtype_of(weight)};
  }

  // Each block of rows sums its share of grad_weight apart; then the shares are added in order.
  void set_blocks(int64_t blocks) {
    scratch = new_tensor(rows, {blocks, 2, params.row_size}, accumulate_dtype(rows));
    params.scratch = scratch.mutable_data_ptr();
    params.blocks = blocks;
  }

  Index index;
  Inverse inverse;
  Tensor grad_rows, grad_normed, rows, rstd, weight, scratch, grad_x, grad_weight;
  GatherRmsNormBwdParams params;
};

}  // namespace mor
