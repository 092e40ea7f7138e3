// The only file that names LibTorch: the stable ABI's tensors, allocation, thread pool, devices and
// streams, and the argument checks. Host files include it; kernel files do not.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
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

// ---- where ops register ----
// The CUDA host files are built twice: for CUDA tensors in torch.ops.mor, and with csrc/simt for
// CPU tensors in torch.ops.mor_simt.

#if defined(MOR_SIMT)
#define MOR_LIBRARY(m) STABLE_TORCH_LIBRARY(mor_simt, m)
#define MOR_LIBRARY_IMPL_CUDA(m) STABLE_TORCH_LIBRARY_IMPL(mor_simt, CPU, m)
#define MOR_LIBRARY_IMPL_ANY(m) STABLE_TORCH_LIBRARY_IMPL(mor_simt, CompositeExplicitAutograd, m)
#else
#define MOR_LIBRARY(m) STABLE_TORCH_LIBRARY(mor, m)
#define MOR_LIBRARY_IMPL_CUDA(m) STABLE_TORCH_LIBRARY_IMPL(mor, CUDA, m)
#define MOR_LIBRARY_IMPL_ANY(m) STABLE_TORCH_LIBRARY_IMPL(mor, CompositeExplicitAutograd, m)
#endif

// In libtorch_cpu from torch 2.13 on.
extern "C" __attribute__((weak)) AOTITorchError torch_stream_native_handle(StreamHandle stream,
                                                                           void** handle);

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

// The current cudaStream_t of a device.
inline void* current_stream(int32_t device) {
  void* stream = nullptr;
#if !defined(MOR_SIMT)
  if (torch_stream_native_handle != nullptr) {
    StreamHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_stream(device, &handle));
    const torch::stable::accelerator::Stream owner(handle);
    STABLE_TORCH_ERROR_CODE_CHECK(torch_stream_native_handle(handle, &stream));
    return stream;
  }
  // In libtorch_cuda, which a CPU-only torch lacks: to link to it would stop this binary from
  // loading there. Whoever has a CUDA tensor has it loaded.
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const auto get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<GetStream>(symbol);
  }();
  if (get_stream == nullptr) {
    throw std::runtime_error("mor: no current stream: libtorch_cuda.so is not loaded");
  }
  STABLE_TORCH_ERROR_CODE_CHECK(get_stream(device, &stream));
#else
  (void)device;
#endif
  return stream;
}

}  // namespace abi

// ---- devices ----

// Whether the elements of CUDA index tensors are checked too, at the cost of waiting for them.
inline std::atomic<bool> debug_checks{false};

// While it lives, the tensor's device is the current one; stream() is that device's current stream.
class OnDevice {
 public:
#if defined(MOR_SIMT)
  explicit OnDevice(const Tensor&) {}
  void* stream() const { return nullptr; }
#else
  explicit OnDevice(const Tensor& tensor)
      : device_(tensor.get_device_index()), guard_(tensor.get_device_index()) {}
  void* stream() const { return abi::current_stream(device_); }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

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

// The elements of an int32 tensor where checks may read them: those of a CPU tensor, and of a CUDA
// tensor a copy if debug_checks is set; else none.
class Readable {
 public:
  explicit Readable(const Tensor& tensor) {
#if defined(MOR_SIMT)
    const bool on_host = debug_checks;
#else
    const bool on_host = tensor.is_cpu();
#endif
    if (on_host) {
      storage_ = dense(tensor);
    } else if (debug_checks) {
      storage_ =
          dense(torch::stable::to(tensor, torch::stable::Device(torch::stable::DeviceType::CPU)));
    } else {
      return;
    }
    readable_ = true;
    data_ = storage_.const_data_ptr<int32_t>();
  }

  explicit operator bool() const { return readable_; }
  const int32_t* data() const { return data_; }
  int64_t count() const { return storage_.numel(); }
  int32_t operator[](int64_t i) const { return data_[i]; }

 private:
  Tensor storage_;
  const int32_t* data_ = nullptr;
  bool readable_ = false;
};

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
#if defined(MOR_SIMT)
    const bool fp64_on_cpu = false;  // CPU tensors stand for CUDA tensors
#else
    const bool fp64_on_cpu = t == ScalarType::Double && tensor.is_cpu();
#endif
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

  // After a launch; description: cudaGetErrorString(error).
  void launched(int error, const char* description) const {
    if (error != 0) {
      throw std::runtime_error(str("mor::", op_, ": CUDA error ", error, ": ", description));
    }
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
