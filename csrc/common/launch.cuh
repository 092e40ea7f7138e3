// The one way in which kernels are launched. Kernel files include this, host files do not.
#pragma once

#include <cuda_runtime_api.h>

#include <type_traits>

#include "common/primitives.cuh"

namespace mor {

struct LaunchShape {
  Index3 grid;  // of blocks; nothing runs where one of them is 0
  int block;    // threads
  int64_t shared_bytes = 0;
};

template <typename T>
constexpr T ceil_div(T value, std::type_identity_t<T> divisor) {
  return (value + divisor - 1) / divisor;
}

// Calls f.template operator()<T>() with the storage type that dtype names; data on CUDA devices are
// never fp64.
template <typename F>
cudaError_t dispatch_data_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kBFloat16:
      return f.template operator()<bfloat16>();
    case DType::kFloat16:
      return f.template operator()<float16>();
    default:
      return f.template operator()<float>();
  }
}

// name: for messages. The arguments are copied.
template <typename... Args>
cudaError_t launch(const char* name, void (*kernel)(Args...), const LaunchShape& shape,
                   cudaStream_t stream, const std::type_identity_t<Args>&... args) {
  const auto [grid, block, shared_bytes] = shape;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) {
    return cudaSuccess;
  }
#if defined(MOR_SIMT)
  (void)stream;
  auto body = [&] { kernel(args...); };
  const std::string error = simt::run(
      {name, {grid.x, grid.y, grid.z}, block, shared_bytes},
      [](void* f) { (*static_cast<decltype(body)*>(f))(); }, &body);
  return error.empty() ? cudaSuccess : simt::launch_failed(error);
#else
  constexpr int64_t kDefaultLimit = 48 << 10;
  if (shared_bytes > kDefaultLimit) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) {
      return error;
    }
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.x, grid.y, grid.z);
  config.blockDim = dim3(static_cast<unsigned>(block));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args...);
#endif
}

}  // namespace mor
