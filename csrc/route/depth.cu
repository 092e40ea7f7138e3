// route_depth: for few recursions a thread takes several rows whole, for many a warp takes one row.
#include "common/launch.cuh"
#include "route/keys.cuh"
#include "route/launch.h"

namespace mor::cuda {
namespace {

__device__ float bias_of(const RouteDepthParams& p, int64_t r) {
  return p.bias != nullptr ? static_cast<const float*>(p.bias)[r] : 0.0f;
}

template <typename T>
__device__ bool is_aligned16(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// ---- few recursions ----

constexpr int kFewRecursions = 8;
constexpr int kFewThreads = 128;

// kRows rows of logits are kRecursions vectors of 16 bytes.
template <typename T>
constexpr int kRows = kVector16<T>;

template <typename T, int kRecursions>
__device__ void load_rows(Vector<T, kRows<T>> (&logits)[kRecursions], const T* from, int count) {
  if (count == kRows<T> && is_aligned16(from)) {
#pragma unroll
    for (int i = 0; i < kRecursions; ++i) {
      logits[i] = reinterpret_cast<const Vector<T, kRows<T>>*>(from)[i];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kRecursions * kRows<T>; ++i) {
    logits[i / kRows<T>][i % kRows<T>] = i < count * kRecursions ? from[i] : T{};
  }
}

template <int kVectors>
__device__ void store_depths(const Vector<int32_t, 4> (&depths)[kVectors], int32_t* to, int count) {
#pragma unroll
  for (int i = 0; i < kVectors * 4; ++i) {
    if (count == kVectors * 4) {
      if (i % 4 == 0) {
        reinterpret_cast<Vector<int32_t, 4>*>(to)[i / 4] = depths[i / 4];
      }
    } else if (i < count) {
      to[i] = depths[i / 4][i % 4];
    }
  }
}

template <typename T, int kRecursions>
__global__ void __launch_bounds__(kFewThreads) depth_of_few(const RouteDepthParams p) {
  const Shared<int32_t> load = SharedArena().take<int32_t>(kRecursions);
  if (thread_index() < kRecursions) {
    load[thread_index()] = 0;
  }
  sync_threads();
  const int64_t first = (int64_t{block_index().x} * kFewThreads + thread_index()) * kRows<T>;
  const int count = static_cast<int>(std::min<int64_t>(p.rows - first, kRows<T>));
  if (count > 0) {
    Vector<T, kRows<T>> logits[kRecursions];
    load_rows(logits, static_cast<const T*>(p.logits) + first * kRecursions, count);
    float bias[kRecursions];
#pragma unroll
    for (int r = 0; r < kRecursions; ++r) {
      bias[r] = bias_of(p, r);
    }
    Vector<int32_t, 4> depths[kRows<T> / 4];
#pragma unroll
    for (int row = 0; row < kRows<T>; ++row) {
      float best = 0;
      int32_t depth = 0;
#pragma unroll
      for (int r = 0; r < kRecursions; ++r) {
        const int i = row * kRecursions + r;
        const float value = to_float(logits[i / kRows<T>][i % kRows<T>]) + bias[r];
        const bool first_nan = value != value && best == best;
        if (r == 0 || value > best || first_nan) {
          best = value;
          depth = r + 1;
        }
      }
      depths[row / 4][row % 4] = depth;
      if (row < count) {
        atomic_add(load + (depth - 1), 1);
      }
    }
    store_depths(depths, p.depth + first, count);
  }
  sync_threads();
  if (thread_index() < kRecursions) {
    const int32_t tokens = load[thread_index()];
    atomic_add(p.load + thread_index(), tokens);
  }
}

template <typename T, int kRecursions = 1>
cudaError_t launch_few(const RouteDepthParams& p, cudaStream_t stream) {
  if constexpr (kRecursions < kFewRecursions) {
    if (p.recursions > kRecursions) {
      return launch_few<T, kRecursions + 1>(p, stream);
    }
  }
  const int64_t blocks = ceil_div(p.rows, kFewThreads * kRows<T>);
  const LaunchShape shape{
      {static_cast<uint32_t>(blocks), 1, 1}, kFewThreads, shared_bytes<int32_t>(kRecursions)};
  return launch("route_depth", depth_of_few<T, kRecursions>, shape, stream, p);
}

// ---- many recursions ----

constexpr int kManyThreads = 256;
constexpr int kManyWarps = kManyThreads / kWarpSize;
constexpr int64_t kMaxCounters = 4096;  // in shared memory; past that in global memory alone

// Larger for a larger logit (NaN above all), then for a lower recursion.
__device__ uint64_t rank_of(const RouteDepthParams& p, float logit, int64_t r) {
  return uint64_t{key_of(logit + bias_of(p, r))} << 32 | static_cast<uint32_t>(~r);
}

// 1 + argmax of a row, found by a warp.
template <typename T>
__device__ int32_t depth_of_row(const RouteDepthParams& p, const T* logits) {
  uint64_t best = 0;
  int64_t done = 0;
  if (is_aligned16(logits)) {
    const auto* vectors = reinterpret_cast<const Vector<T, kVector16<T>>*>(logits);
    const int64_t count = p.recursions / kVector16<T>;
    for (int64_t i = lane_index(); i < count; i += kWarpSize) {
      const Vector<T, kVector16<T>> vector = vectors[i];
#pragma unroll
      for (int e = 0; e < kVector16<T>; ++e) {
        best = std::max(best, rank_of(p, to_float(vector[e]), i * kVector16<T> + e));
      }
    }
    done = count * kVector16<T>;
  }
  for (int64_t r = done + lane_index(); r < p.recursions; r += kWarpSize) {
    best = std::max(best, rank_of(p, to_float(logits[r]), r));
  }
  best = warp_reduce(best, [](uint64_t a, uint64_t b) { return std::max(a, b); });
  return static_cast<int32_t>(~static_cast<uint32_t>(best)) + 1;
}

template <typename T>
__global__ void __launch_bounds__(kManyThreads) depth_of_many(const RouteDepthParams p) {
  const int counters = p.recursions <= kMaxCounters ? static_cast<int>(p.recursions) : 0;
  const Shared<int32_t> load = SharedArena().take<int32_t>(counters);
  for (int i = thread_index(); i < counters; i += kManyThreads) {
    load[i] = 0;
  }
  sync_threads();
  const int64_t warp = int64_t{block_index().x} * kManyWarps + thread_index() / kWarpSize;
  for (int64_t row = warp; row < p.rows; row += int64_t{grid_size().x} * kManyWarps) {
    const int32_t depth = depth_of_row(p, static_cast<const T*>(p.logits) + row * p.recursions);
    if (lane_index() == 0) {
      p.depth[row] = depth;
      if (counters > 0) {
        atomic_add(load + (depth - 1), 1);
      } else {
        atomic_add(p.load + (depth - 1), 1);
      }
    }
  }
  sync_threads();
  for (int i = thread_index(); i < counters; i += kManyThreads) {
    const int32_t tokens = load[i];
    if (tokens > 0) {
      atomic_add(p.load + i, tokens);
    }
  }
}

template <typename T>
cudaError_t launch_many(const RouteDepthParams& p, cudaStream_t stream) {
  // Blocks take several rows if there are many: to clear and add up the counters costs as well.
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) {
    return error;
  }
  constexpr int kBlocksPerProcessor = 2048 / kManyThreads;
  const int64_t blocks =
      std::min<int64_t>(ceil_div(p.rows, kManyWarps), processors * kBlocksPerProcessor);
  const int64_t counters = p.recursions <= kMaxCounters ? p.recursions : 0;
  const LaunchShape shape{
      {static_cast<uint32_t>(blocks), 1, 1}, kManyThreads, shared_bytes<int32_t>(counters)};
  return launch("route_depth", depth_of_many<T>, shape, stream, p);
}

}  // namespace

cudaError_t route_depth(const RouteDepthParams& p, cudaStream_t stream) {
  const cudaError_t error =
      cudaMemsetAsync(p.load, 0, static_cast<size_t>(p.recursions) * sizeof(int32_t), stream);
  if (error != cudaSuccess) {
    return error;
  }
  return dispatch_data_dtype(p.dtype, [&]<typename T>() {
    return p.recursions <= kFewRecursions ? launch_few<T>(p, stream) : launch_many<T>(p, stream);
  });
}

}  // namespace mor::cuda
