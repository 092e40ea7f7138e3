// route_topk of sequences that fit one block each, and the choice between that and topk_long.cu.
#include "route/topk.cuh"

namespace mor::cuda {
namespace {

template <typename T, int kThreads, int kItems>
__global__ void __launch_bounds__(kThreads, 1) topk_short(const RouteTopkParams p) {
  SharedArena arena;
  const Workspace shared(arena);
  select_rows<T, kThreads, kItems>(p, sequence_of(p, block_index().x), shared);
}

template <typename T, int kThreads, int kItems>
cudaError_t launch_short(const RouteTopkParams& p, cudaStream_t stream) {
  const LaunchShape shape{{static_cast<uint32_t>(p.batch), 1, 1}, kThreads, Workspace::bytes()};
  return launch("route_topk", topk_short<T, kThreads, kItems>, shape, stream, p);
}

// Few keys a thread while that fills a block: what a block takes is latency, not throughput.
template <typename T>
cudaError_t route_topk_short(const RouteTopkParams& p, cudaStream_t stream) {
  if (p.max_seqlen <= 512) {
    return launch_short<T, 128, 4>(p, stream);
  }
  if (p.max_seqlen <= 2048) {
    return launch_short<T, 512, 4>(p, stream);
  }
  if (p.max_seqlen <= 4096) {
    return launch_short<T, 1024, 4>(p, stream);
  }
  if (p.max_seqlen <= 8192) {
    return launch_short<T, 1024, 8>(p, stream);
  }
  static_assert(kLongestShort == 1024 * 16);
  return launch_short<T, 1024, 16>(p, stream);
}

}  // namespace

cudaError_t route_topk(const RouteTopkParams& p, cudaStream_t stream) {
  if (p.total_out == 0) {
    return cudaSuccess;
  }
  if (p.batch == 0) {  // wrong, as total_out is not 0; but the result is to be defined
    return cudaMemsetAsync(p.index, 0xff, static_cast<size_t>(p.total_out) * sizeof(int32_t),
                           stream);
  }
  if (p.max_seqlen > kLongestShort) {
    return route_topk_long(p, stream);
  }
  return dispatch_data_dtype(p.dtype, [&]<typename T>() { return route_topk_short<T>(p, stream); });
}

}  // namespace mor::cuda
