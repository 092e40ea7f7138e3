// Plain types that cross the border between host code and kernels. No torch header here.
#pragma once

#include <bit>
#include <cstdint>

namespace mor {

enum class DType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

// The type that arithmetic happens in: fp64 for fp64, fp32 for everything else.
template <typename T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <typename T>
using accumulate_t = typename AccumulateType<T>::type;

// Calls f.template operator()<T>() with the storage type that dtype names.
template <typename F>
void dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f.template operator()<float>();
    case DType::kFloat64:
      return f.template operator()<double>();
    case DType::kBFloat16:
      return f.template operator()<bfloat16>();
    case DType::kFloat16:
      return f.template operator()<float16>();
  }
}

}  // namespace mor
