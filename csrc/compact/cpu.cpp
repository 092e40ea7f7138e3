// CPU host side of the compact family: checks, allocation, registration.
#include <algorithm>

#include "compact/compact.h"

namespace mor {
namespace {

// A checked index, contiguous.
struct Index {
  Index(const Checks& check, const Tensor& tensor, int64_t num_rows) {
    check.int32_vector("index", tensor, -1, "[K]");
    storage = dense(tensor);
    data = storage.const_data_ptr<int32_t>();
    count = tensor.numel();
    check.within("index", data, count, -1, num_rows);
  }

  Tensor storage;
  const int32_t* data;
  int64_t count;
};

struct Inverse {
  Inverse(const Index& index, int64_t num_rows) {
    storage = new_tensor(index.storage, {num_rows + index.count});
    auto* first = storage.mutable_data_ptr<int32_t>();
    int32_t* next = first + num_rows;
    std::fill_n(first, num_rows, -1);
    for (int64_t i = index.count - 1; i >= 0; --i) {
      if (index.data[i] >= 0) {
        next[i] = first[index.data[i]];
        first[index.data[i]] = static_cast<int32_t>(i);
      }
    }
    lists = {first, next};
  }

  Tensor storage;
  InverseIndex lists;
};

void check_unique(const Checks& check, const Index& index, const Inverse& inverse) {
  for (int64_t i = 0; i < index.count; ++i) {
    if (index.data[i] >= 0 && inverse.lists.next[i] >= 0) {
      check.fail("index", "unique (-1 aside)",
                 str(index.data[i], " at elements ", i, " and ", inverse.lists.next[i]));
    }
  }
}

bool strictly_ascending(const Index& index) {
  int32_t last = -1;
  for (int64_t i = 0; i < index.count; ++i) {
    if (index.data[i] >= 0) {
      if (index.data[i] <= last) {
        return false;
      }
      last = index.data[i];
    }
  }
  return true;
}

// A checked gate, contiguous; no data if there is none.
struct DenseGate {
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

// Whether elements of the tensor may share memory.
bool overlapping(const Tensor& tensor) {
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
std::pair<const char*, const char*> extent(const Tensor& tensor) {
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    last += (tensor.size(d) - 1) * tensor.stride(d);
  }
  const auto* begin = static_cast<const char*>(tensor.const_data_ptr());
  return {begin, begin + (last + 1) * static_cast<int64_t>(tensor.element_size())};
}

// The tensor itself, or a copy if writing to target could change it.
Tensor unaliased(const Tensor& tensor, const Tensor& target) {
  if (tensor.numel() == 0 || target.numel() == 0) {
    return tensor;
  }
  const auto [begin, end] = extent(tensor);
  const auto [target_begin, target_end] = extent(target);
  return begin < target_end && target_begin < end ? torch::stable::clone(tensor) : tensor;
}

std::tuple<Tensor, Tensor> compact_depth(const Tensor& depth, const Tensor& cu_seqlens,
                                         int64_t num_recursions) {
  const Checks check("compact_depth");
  check.int32_vector("depth", depth, -1, "[N]");
  check.int32_vector("cu_seqlens", cu_seqlens, -1, "[batch + 1]");
  check.require(cu_seqlens.numel() > 0, "cu_seqlens", "of shape [batch + 1]",
                shape_str(cu_seqlens));
  check.require(num_recursions >= 1 && num_recursions <= kMaxRecursions, "num_recursions",
                str("in [1, ", kMaxRecursions, "]"), num_recursions);
  const int64_t rows = depth.numel(), batch = cu_seqlens.numel() - 1;
  const Tensor dense_depth = dense(depth), dense_lengths = dense(cu_seqlens);
  const auto* depths = dense_depth.const_data_ptr<int32_t>();
  const auto* start = dense_lengths.const_data_ptr<int32_t>();
  check.cumulative("cu_seqlens", start, batch, rows);
  check.within("depth", depths, rows, 0, num_recursions + 1);

  Tensor index = new_tensor(depth, {num_recursions, rows});
  Tensor cu_seqlens_out = new_tensor(depth, {num_recursions, batch + 1});
  cpu::compact_depth({.depth = depths,
                      .cu_seqlens = start,
                      .index = index.mutable_data_ptr<int32_t>(),
                      .cu_seqlens_out = cu_seqlens_out.mutable_data_ptr<int32_t>(),
                      .rows = rows,
                      .batch = batch,
                      .recursions = num_recursions});
  return {index, cu_seqlens_out};
}

Tensor gather_tokens(const Tensor& x, const Tensor& index) {
  const Checks check("gather_tokens");
  check_rows(check, "x", x);
  const Index rows(check, index, x.size(0));
  const Tensor source = dense_inner(x, x.dim() - 1);
  Tensor out = new_rows_like(x, rows.count);
  cpu::gather_tokens({.x = source.const_data_ptr(),
                      .index = rows.data,
                      .out = out.mutable_data_ptr(),
                      .count = rows.count,
                      .row_size = row_size_of(x),
                      .row_stride = source.stride(0),
                      .element_bytes = static_cast<int64_t>(x.element_size())});
  return out;
}

Tensor gather_tokens_bwd(const Tensor& grad, const Tensor& index, int64_t num_rows) {
  const Checks check("gather_tokens_bwd");
  check_rows(check, "grad", grad);
  check.require(num_rows >= 0 && num_rows <= kMaxRows, "num_rows", "in [0, 2^31)", num_rows);
  const Index rows(check, index, num_rows);
  check.require(grad.size(0) == rows.count, "grad", "of shape [K, ...]", shape_str(grad));
  const Tensor source = dense_inner(grad, grad.dim() - 1);
  const Inverse inverse(rows, num_rows);
  Tensor grad_x = new_rows_like(grad, num_rows);
  cpu::gather_tokens_bwd({.grad = source.const_data_ptr(),
                          .inverse = inverse.lists,
                          .grad_x = grad_x.mutable_data_ptr(),
                          .num_rows = num_rows,
                          .row_size = row_size_of(grad),
                          .grad_stride = source.stride(0),
                          .dtype = dtype_of(grad)});
  return grad_x;
}

Tensor scatter_tokens(const Tensor& x, const Tensor& update, const Tensor& index,
                      const std::optional<Tensor>& gate) {
  const Checks check("scatter_tokens");
  check_rows(check, "x", x);
  const Index rows(check, index, x.size(0));
  check_rows_like(check, "update", update, rows.count, x);
  const DenseGate gates(check, gate, rows.count, x);
  const Inverse inverse(rows, x.size(0));
  check_unique(check, rows, inverse);

  const Tensor source = dense_inner(x, x.dim() - 1);
  const Tensor updates = dense_inner(update, x.dim() - 1);
  Tensor out = new_rows_like(x, x.size(0));
  cpu::scatter_tokens({.x = source.const_data_ptr(),
                       .update = updates.const_data_ptr(),
                       .gate = gates.gate,
                       .source = inverse.lists.first,
                       .out = out.mutable_data_ptr(),
                       .num_rows = x.size(0),
                       .row_size = row_size_of(x),
                       .x_stride = source.stride(0),
                       .update_stride = updates.stride(0),
                       .dtype = dtype_of(x)});
  return out;
}

void scatter_tokens_(Tensor x, const Tensor& update, const Tensor& index,
                     const std::optional<Tensor>& gate) {
  const Checks check("scatter_tokens_");
  check_rows(check, "x", x);
  check.require(!overlapping(x), "x", "of elements that share no memory", "an expanded tensor");
  const Index rows(check, index, x.size(0));
  check_rows_like(check, "update", update, rows.count, x);
  const DenseGate gates(check, gate, rows.count, x);
  if (!strictly_ascending(rows)) {
    check_unique(check, rows, Inverse(rows, x.size(0)));
  }

  // Rows whose elements are not dense are updated in a copy, which is then copied back.
  Tensor target = dense_inner(x, x.dim() - 1);
  const Tensor updates = unaliased(dense_inner(update, x.dim() - 1), x);
  const Tensor gate_storage = gate ? unaliased(gates.storage, x) : gates.storage;
  cpu::scatter_tokens_({.x = target.mutable_data_ptr(),
                        .update = updates.const_data_ptr(),
                        .gate = {gate ? gate_storage.const_data_ptr() : nullptr, gates.gate.dtype},
                        .index = rows.data,
                        .count = rows.count,
                        .row_size = row_size_of(x),
                        .x_stride = target.stride(0),
                        .update_stride = updates.stride(0),
                        .dtype = dtype_of(x)});
  if (target.const_data_ptr() != x.const_data_ptr()) {
    torch::stable::copy_(x, target);
  }
}

std::tuple<Tensor, Tensor> scatter_tokens_bwd(const Tensor& grad, const Tensor& index,
                                              const std::optional<Tensor>& update,
                                              const std::optional<Tensor>& gate) {
  const Checks check("scatter_tokens_bwd");
  check_rows(check, "grad", grad);
  const Index rows(check, index, grad.size(0));
  const DenseGate gates(check, gate, rows.count, grad);
  const Tensor source = dense_inner(grad, grad.dim() - 1);
  Tensor grad_update = new_rows_like(grad, rows.count);
  Tensor grad_gate = new_tensor(gate ? *gate : grad, {update ? rows.count : 0});
  Tensor updates = grad_update;
  if (update) {
    check.require(gate.has_value(), "gate", "given where update is", "None");
    check_rows_like(check, "update", *update, rows.count, grad);
    updates = dense_inner(*update, grad.dim() - 1);
  }
  cpu::scatter_tokens_bwd({.grad = source.const_data_ptr(),
                           .update = update ? updates.const_data_ptr() : nullptr,
                           .gate = gates.gate,
                           .index = rows.data,
                           .grad_update = grad_update.mutable_data_ptr(),
                           .grad_gate = grad_gate.mutable_data_ptr(),
                           .count = rows.count,
                           .row_size = row_size_of(grad),
                           .grad_stride = source.stride(0),
                           .update_stride = updates.stride(0),
                           .dtype = dtype_of(grad)});
  return {grad_update, grad_gate};
}

std::tuple<Tensor, Tensor, Tensor> gather_rms_norm(const Tensor& x, const Tensor& index,
                                                   const Tensor& weight, double eps) {
  const Checks check("gather_rms_norm");
  check_rows(check, "x", x);
  check.shape("x", x, {-1, -1}, "[N, hidden]");
  const Index rows(check, index, x.size(0));
  check.same_device("weight", weight, x);
  check.factor_dtype("weight", weight, x);
  check.shape("weight", weight, {x.size(1)}, "[hidden]");
  check.require(eps >= 0, "eps", "at least 0", eps);

  const Tensor source = dense_inner(x, 1), weights = dense(weight);
  Tensor out_rows = new_rows_like(x, rows.count);
  Tensor normed = new_rows_like(x, rows.count);
  Tensor rstd = new_tensor(x, {rows.count}, accumulate_dtype(x));
  cpu::gather_rms_norm({.x = source.const_data_ptr(),
                        .index = rows.data,
                        .weight = weights.const_data_ptr(),
                        .rows = out_rows.mutable_data_ptr(),
                        .normed = normed.mutable_data_ptr(),
                        .rstd = rstd.mutable_data_ptr(),
                        .count = rows.count,
                        .row_size = x.size(1),
                        .x_stride = source.stride(0),
                        .eps = eps,
                        .dtype = dtype_of(x),
                        .weight_dtype = dtype_of(weight)});
  return {out_rows, normed, rstd};
}

std::tuple<Tensor, Tensor> gather_rms_norm_bwd(const std::optional<Tensor>& grad_rows,
                                               const std::optional<Tensor>& grad_normed,
                                               const Tensor& rows, const Tensor& rstd,
                                               const Tensor& index, const Tensor& weight,
                                               int64_t num_rows) {
  const Checks check("gather_rms_norm_bwd");
  check_rows(check, "rows", rows);
  check.shape("rows", rows, {-1, -1}, "[K, hidden]");
  const int64_t count = rows.size(0), hidden = rows.size(1);
  check.require(num_rows >= 0 && num_rows <= kMaxRows, "num_rows", "in [0, 2^31)", num_rows);
  const Index checked_index(check, index, num_rows);
  check.require(checked_index.count == count, "index", "of shape [K]", shape_str(index));
  check.same_device("rstd", rstd, rows);
  check.dtype("rstd", rstd, accumulate_dtype(rows));
  check.shape("rstd", rstd, {count}, "[K]");
  check.same_device("weight", weight, rows);
  check.factor_dtype("weight", weight, rows);
  check.shape("weight", weight, {hidden}, "[hidden]");
  const auto dense_grad = [&](const char* name, const std::optional<Tensor>& grad) {
    if (!grad) {
      return Tensor();
    }
    check_rows_like(check, name, *grad, count, rows);
    return dense(*grad);
  };
  const Tensor dense_grad_rows = dense_grad("grad_rows", grad_rows);
  const Tensor dense_grad_normed = dense_grad("grad_normed", grad_normed);

  const Inverse inverse(checked_index, num_rows);
  const Tensor dense_rows = dense(rows), dense_rstd = dense(rstd), weights = dense(weight);
  // Blocks of rows whose shares of grad_weight are summed apart, then in order: their number
  // depends on the shape alone, so that the sum does not depend on the number of threads.
  const int64_t blocks = std::clamp<int64_t>(num_rows / 32, 1, 64);
  Tensor scratch = new_tensor(rows, {blocks, 2, hidden}, accumulate_dtype(rows));
  Tensor grad_x = new_rows_like(rows, num_rows);
  Tensor grad_weight = new_tensor(weight, {hidden});
  cpu::gather_rms_norm_bwd(
      {.grad_rows = grad_rows ? dense_grad_rows.const_data_ptr() : nullptr,
       .grad_normed = grad_normed ? dense_grad_normed.const_data_ptr() : nullptr,
       .rows = dense_rows.const_data_ptr(),
       .rstd = dense_rstd.const_data_ptr(),
       .weight = weights.const_data_ptr(),
       .inverse = inverse.lists,
       .scratch = scratch.mutable_data_ptr(),
       .grad_x = grad_x.mutable_data_ptr(),
       .grad_weight = grad_weight.mutable_data_ptr(),
       .num_rows = num_rows,
       .row_size = hidden,
       .blocks = blocks,
       .dtype = dtype_of(rows),
       .weight_dtype = dtype_of(weight)});
  return {grad_x, grad_weight};
}

}  // namespace
}  // namespace mor

STABLE_TORCH_LIBRARY_IMPL(mor, CPU, m) {
  m.impl("compact_depth", TORCH_BOX(&mor::compact_depth));
  m.impl("gather_tokens", TORCH_BOX(&mor::gather_tokens));
  m.impl("gather_tokens_bwd", TORCH_BOX(&mor::gather_tokens_bwd));
  m.impl("scatter_tokens", TORCH_BOX(&mor::scatter_tokens));
  m.impl("scatter_tokens_", TORCH_BOX(&mor::scatter_tokens_));
  m.impl("scatter_tokens_bwd", TORCH_BOX(&mor::scatter_tokens_bwd));
  m.impl("gather_rms_norm", TORCH_BOX(&mor::gather_rms_norm));
  m.impl("gather_rms_norm_bwd", TORCH_BOX(&mor::gather_rms_norm_bwd));
}
