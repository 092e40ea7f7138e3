// Stands in for CUDA's header of this name where kernels run on the host: the few functions that
// the host side of the ops calls.
#pragma once

#include <cstddef>
#include <cstring>
#include <string>

enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
};
using cudaStream_t = void*;

namespace mor::simt {

inline thread_local std::string last_error;

inline cudaError_t launch_failed(const std::string& error) {
  last_error = error;
  return cudaErrorLaunchFailure;
}

}  // namespace mor::simt

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : mor::simt::last_error.c_str();
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

// Few, so that a grid made to fill the device has blocks with several pieces of work.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 3;
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  if (bytes > 0) {
    std::memset(to, value, bytes);
  }
  return cudaSuccess;
}
