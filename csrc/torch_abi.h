// The only file that names LibTorch: the stable ABI's tensors, allocation and thread pool, and
// the argument checks. Host files include it; kernel files do not.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/types.h"

namespace mor {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace abi {

inline void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*),
                         void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, body, context));
}

inline int64_t num_threads() {
  return torch::stable::get_num_threads();
}

}  // namespace abi

// ---- tensors ----

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      return DType::kFloat16;
  }
}

// The dtype that arithmetic on the tensor's elements happens in.
inline ScalarType accumulate_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// An uninitialised tensor on the device of like, of like's dtype unless another is given.
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes,
                         std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// The tensor itself if it is contiguous, else a contiguous copy.
inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// The tensor itself if the elements of its last `inner` dimensions lie densely, else a
// contiguous copy: kernels walk the outer dimensions by stride and the inner ones by pointer.
inline Tensor dense_inner(const Tensor& tensor, int64_t inner) {
  int64_t expected = 1;
  for (int64_t d = tensor.dim() - 1; d >= tensor.dim() - inner; --d) {
    if (tensor.size(d) != 1 && tensor.stride(d) != expected) {
      return torch::stable::contiguous(tensor);
    }
    expected *= tensor.size(d);
  }
  return tensor;
}

// ---- messages: "mor::<op>: <argument> must be <rule>, got <value>" ----

template <typename... Parts>
std::string str(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// Prints as "shape [2, 3]"; spelt out only if a check fails.
struct ShapeOf {
  const Tensor& tensor;
};

inline ShapeOf shape_str(const Tensor& tensor) {
  return {tensor};
}

inline std::ostream& operator<<(std::ostream& out, const ShapeOf& shape) {
  out << "shape [";
  for (int64_t d = 0; d < shape.tensor.dim(); ++d) {
    out << (d ? ", " : "") << shape.tensor.size(d);
  }
  return out << "]";
}

inline std::string device_str(const Tensor& tensor) {
  if (tensor.is_cpu()) {
    return "cpu";
  }
  return tensor.is_cuda() ? str("cuda:", tensor.get_device_index()) : "another device";
}

inline const char* dtype_str(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

// The argument checks of one op. Those that read elements are for CPU tensors only.
class Checks {
 public:
  explicit Checks(const char* op) : op_(op) {}

  template <typename Rule, typename Got>
  void require(bool ok, const char* argument, const Rule& rule, const Got& got) const {
    if (!ok) {
      fail(argument, rule, got);
    }
  }

  template <typename Rule, typename Got>
  [[noreturn]] void fail(const char* argument, const Rule& rule, const Got& got) const {
    throw std::runtime_error(str("mor::", op_, ": ", argument, " must be ", rule, ", got ", got));
  }

  void floating(const char* argument, const Tensor& tensor) const {
    const ScalarType t = tensor.scalar_type();
    const bool fp64_on_cpu = t == ScalarType::Double && tensor.is_cpu();
    require(
        t == ScalarType::Float || t == ScalarType::BFloat16 || t == ScalarType::Half || fp64_on_cpu,
        argument, "float32, bfloat16 or float16 (float64 too on CPU)", dtype_str(t));
  }

  void dtype(const char* argument, const Tensor& tensor, ScalarType expected) const {
    require(tensor.scalar_type() == expected, argument, dtype_str(expected),
            dtype_str(tensor.scalar_type()));
  }

  // For factors on data: gates, biases, norm weights.
  void factor_dtype(const char* argument, const Tensor& tensor, const Tensor& data) const {
    const ScalarType own = data.scalar_type(), got = tensor.scalar_type();
    if (got != ScalarType::Float && got != own) {
      fail(argument, own == ScalarType::Float ? "float32" : str("float32 or ", dtype_str(own)),
           dtype_str(got));
    }
  }

  void int32(const char* argument, const Tensor& tensor) const {
    dtype(argument, tensor, ScalarType::Int);
  }

  void dims(const char* argument, const Tensor& tensor, int64_t expected) const {
    if (tensor.dim() != expected) {
      fail(argument, str(expected, "-dimensional"), shape_str(tensor));
    }
  }

  // sizes: the expected shape; -1 stands for any size. rule: how the shape is written in the docs.
  void shape(const char* argument, const Tensor& tensor, std::initializer_list<int64_t> sizes,
             const char* rule) const {
    bool ok = tensor.dim() == static_cast<int64_t>(sizes.size());
    int64_t d = 0;
    for (const int64_t size : sizes) {
      ok = ok && (size == -1 || tensor.size(d) == size);
      ++d;
    }
    if (!ok) {
      fail(argument, str("of shape ", rule), shape_str(tensor));
    }
  }

  void on_cpu(const char* argument, const Tensor& tensor) const {
    require(tensor.is_cpu(), argument, "on the CPU like the other arguments", "another device");
  }

  void same_device(const char* argument, const Tensor& tensor, const Tensor& like) const {
    if (tensor.device() != like.device()) {
      fail(argument, str("on ", device_str(like), " like the first argument"), device_str(tensor));
    }
  }

  // Data of like's dtype and device.
  void data(const char* argument, const Tensor& tensor, const Tensor& like,
            std::initializer_list<int64_t> sizes, const char* rule) const {
    same_device(argument, tensor, like);
    dtype(argument, tensor, like.scalar_type());
    shape(argument, tensor, sizes, rule);
  }

  // Indices, lengths or a table on like's device.
  void indices(const char* argument, const Tensor& tensor, const Tensor& like,
               std::initializer_list<int64_t> sizes, const char* rule) const {
    same_device(argument, tensor, like);
    int32(argument, tensor);
    shape(argument, tensor, sizes, rule);
  }

  // An int32 vector [size] on the CPU (-1: any size).
  void int32_vector(const char* argument, const Tensor& tensor, int64_t size,
                    const char* rule) const {
    on_cpu(argument, tensor);
    int32(argument, tensor);
    shape(argument, tensor, {size}, rule);
  }

  // Elements of a contiguous cu_seqlens: starts at 0, never decreases, ends at total.
  void cumulative(const char* argument, const int32_t* cu_seqlens, int64_t batch,
                  int64_t total) const {
    require(cu_seqlens[0] == 0, argument, "0 in its first element", cu_seqlens[0]);
    for (int64_t b = 0; b < batch; ++b) {
      if (cu_seqlens[b + 1] < cu_seqlens[b]) {
        fail(argument, "non-decreasing",
             str(cu_seqlens[b], " then ", cu_seqlens[b + 1], " at element ", b + 1));
      }
    }
    if (cu_seqlens[batch] != total) {
      fail(argument, str(total, " in its last element"), cu_seqlens[batch]);
    }
  }

  // Elements of a contiguous index in [low, high).
  void within(const char* argument, const int32_t* values, int64_t count, int64_t low,
              int64_t high) const {
    int32_t smallest = std::numeric_limits<int32_t>::max();
    int32_t largest = std::numeric_limits<int32_t>::min();
    for (int64_t i = 0; i < count; ++i) {
      smallest = std::min(smallest, values[i]);
      largest = std::max(largest, values[i]);
    }
    if (count > 0 && (smallest < low || largest >= high)) {
      const auto wrong = [&](int32_t value) { return value < low || value >= high; };
      const int32_t* bad = std::find_if(values, values + count, wrong);
      fail(argument, str("in [", low, ", ", high, ") in every element"),
           str(*bad, " at element ", bad - values));
    }
  }

 private:
  const char* op_;
};

}  // namespace mor
