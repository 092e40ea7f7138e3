// gather_tokens and scatter_tokens, in place and not, and their gradients.
#include "compact/rows.cuh"

namespace mor::cuda {
namespace {

// Bits, kBytes a piece.
template <int kBytes>
using Bits = Vector<std::conditional_t<kBytes == 2, uint16_t, uint32_t>, (kBytes + 2) / 4>;

// pieces, piece_stride: of a row and between rows.
template <int kBytes>
__global__ void __launch_bounds__(kThreads)
    gather_tokens_kernel(GatherTokensParams p, int64_t pieces, int64_t piece_stride) {
  const Tile tile(p.count, pieces);
  int32_t rows[kInFlight];
#pragma unroll
  for (int k = 0; k < kInFlight; ++k) {
    rows[k] = p.index[tile.row(k)];
  }
  Bits<kBytes> out[kInFlight] = {};
#pragma unroll
  for (int k = 0; k < kInFlight; ++k) {
    if (names_row(rows[k], p.num_rows)) {
      out[k] = static_cast<const Bits<kBytes>*>(p.x)[rows[k] * piece_stride + tile.piece(k)];
    }
  }
#pragma unroll
  for (int k = 0; k < kInFlight; ++k) {
    if (tile.has(k)) {
      static_cast<Bits<kBytes>*>(p.out)[tile.number(k)] = out[k];
    }
  }
}

// The sum of a piece over the entries of a row.
template <typename T, int kElements>
__device__ Piece<T, kElements> sum_entries(const GatherTokensBwdParams& p, int32_t entry,
                                           int64_t offset) {
  float sums[kElements] = {};
  for (; entry >= 0; entry = p.inverse.next[entry]) {
    const auto* grad = static_cast<const T*>(p.grad) + entry * p.grad_stride;
    const auto piece = Piece<T, kElements>::load(grad + offset);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      sums[i] += piece[i];
    }
  }
  return Piece<T, kElements>::of(sums);
}

template <typename T, int kElements>
__global__ void __launch_bounds__(kThreads) gather_tokens_bwd_kernel(GatherTokensBwdParams p) {
  const Tile tile(p.inverse.num_rows, p.row_size / kElements);
  const bool repeats = has_repeats(p.inverse);
  int32_t entries[kInFlight];
#pragma unroll
  for (int k = 0; k < kInFlight; ++k) {
    entries[k] = p.inverse.first[tile.row(k)];
  }
  Piece<T, kElements> out[kInFlight] = {};
#pragma unroll
  for (int k = 0; k < kInFlight; ++k) {
    if (entries[k] >= 0) {
      const auto* grad = static_cast<const T*>(p.grad) + entries[k] * p.grad_stride;
      out[k] = Piece<T, kElements>::load(grad + tile.piece(k) * kElements);
    }
  }
#pragma unroll
  for (int k = 0; k < kInFlight; ++k) {
    if (repeats && entries[k] >= 0 && p.inverse.next[entries[k]] >= 0) {
      out[k] = sum_entries<T, kElements>(p, entries[k], tile.piece(k) * kElements);
    }
    if (tile.has(k)) {
      out[k].store(static_cast<T*>(p.grad_x) + tile.number(k) * kElements);
    }
  }
}

template <typename T, int kElements>
__global__ void __launch_bounds__(kThreads) scatter_tokens_kernel(ScatterTokensParams p) {
  const Tile tile(p.inverse.num_rows, p.row_size / kElements);
  int32_t entries[kInFlight];
  bool updated[kInFlight];
  Piece<T, kElements> x[kInFlight], update[kInFlight];
  float gates[kInFlight];
#pragma unroll
  for (int k = 0; k < kInFlight; ++k) {
    entries[k] = p.inverse.first[tile.row(k)];
    const auto* row = static_cast<const T*>(p.x) + tile.row(k) * p.x_stride;
    x[k] = Piece<T, kElements>::load(row + tile.piece(k) * kElements);
  }
#pragma unroll
  for (int k = 0; k < kInFlight; ++k) {
    const bool known = entries[k] >= 0 && entries[k] < p.inverse.count;
    updated[k] = known && p.inverse.index[entries[k]] == tile.row(k);
  }
#pragma unroll
  for (int k = 0; k < kInFlight; ++k) {
    if (updated[k]) {
      const auto* row = static_cast<const T*>(p.update) + entries[k] * p.update_stride;
      update[k] = Piece<T, kElements>::load(row + tile.piece(k) * kElements);
      gates[k] = gate_at<T>(p.gate, entries[k]);
    }
  }
#pragma unroll
  for (int k = 0; k < kInFlight; ++k) {
    if (updated[k]) {
      x[k] = add_scaled(x[k], update[k], gates[k]);
    }
    if (tile.has(k)) {
      x[k].store(static_cast<T*>(p.out) + tile.number(k) * kElements);
    }
  }
}

template <typename T, int kElements>
__global__ void __launch_bounds__(kThreads)
    scatter_tokens_inplace_kernel(ScatterTokensInplaceParams p) {
  const Tile tile(p.count, p.row_size / kElements);
  int32_t rows[kInFlight];
#pragma unroll
  for (int k = 0; k < kInFlight; ++k) {
    rows[k] = tile.has(k) ? p.index[tile.row(k)] : -1;
  }
  const auto place = [&](int k) {
    return static_cast<T*>(p.x) + rows[k] * p.x_stride + tile.piece(k) * kElements;
  };
  Piece<T, kElements> x[kInFlight], update[kInFlight];
  float gates[kInFlight];
#pragma unroll
  for (int k = 0; k < kInFlight; ++k) {
    if (names_row(rows[k], p.num_rows)) {
      const int64_t entry = tile.row(k);
      const auto* row = static_cast<const T*>(p.update) + entry * p.update_stride;
      x[k] = Piece<T, kElements>::load(place(k));
      update[k] = Piece<T, kElements>::load(row + tile.piece(k) * kElements);
      gates[k] = gate_at<T>(p.gate, entry);
    }
  }
#pragma unroll
  for (int k = 0; k < kInFlight; ++k) {
    if (names_row(rows[k], p.num_rows)) {
      add_scaled(x[k], update[k], gates[k]).store(place(k));
    }
  }
}

// A team takes a row of grad and its update: grad_update, and grad_gate as their product.
template <typename T, int kElements>
__global__ void __launch_bounds__(kThreads)
    scatter_tokens_bwd_kernel(ScatterTokensBwdParams p, int team_size) {
  SharedArena arena;
  const Team team(arena, team_size);
  const int64_t entry = int64_t{block_index().x} * (kThreads / team_size) + team.number();
  if (entry >= p.count) {
    return;
  }
  const int32_t row = p.index[entry];
  const bool active = names_row(row, p.num_rows), multiply = active && p.update != nullptr;
  const T* grad = static_cast<const T*>(p.grad) + (active ? row * p.grad_stride : 0);
  const T* update = static_cast<const T*>(p.update) + entry * p.update_stride;
  T* grad_update = static_cast<T*>(p.grad_update) + entry * p.row_size;
  const float gate = gate_at<T>(p.gate, entry);
  float product = 0;
  const int step = team_size * kElements;
  for (int64_t begin = team.thread() * kElements; begin < p.row_size; begin += kInFlight * step) {
    Piece<T, kElements> grads[kInFlight] = {}, updates[kInFlight] = {};
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int64_t at = begin + k * step;
      if (active && at < p.row_size) {
        grads[k] = Piece<T, kElements>::load(grad + at);
      }
      if (multiply && at < p.row_size) {
        updates[k] = Piece<T, kElements>::load(update + at);
      }
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      float scaled[kElements];
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        scaled[i] = active ? gate * grads[k][i] : 0;
        product = multiply ? std::fma(grads[k][i], updates[k][i], product) : 0;
      }
      if (const int64_t at = begin + k * step; at < p.row_size) {
        Piece<T, kElements>::of(scaled).store(grad_update + at);
      }
    }
  }
  if (p.update != nullptr) {
    product = team.sum(product);
    if (team.thread() == 0 && p.gate.dtype == DType::kFloat32) {
      static_cast<float*>(p.grad_gate)[entry] = product;
    } else if (team.thread() == 0) {
      static_cast<T*>(p.grad_gate)[entry] = from_float<T>(product);
    }
  }
}

template <int kBytes>
cudaError_t gather_pieces(const GatherTokensParams& p, cudaStream_t stream) {
  const int64_t pieces = p.row_size * p.element_bytes / kBytes;
  return launch("gather_tokens", gather_tokens_kernel<kBytes>, Tile::shape(p.count, pieces), stream,
                p, pieces, p.row_stride * p.element_bytes / kBytes);
}

}  // namespace

cudaError_t gather_tokens(const GatherTokensParams& p, cudaStream_t stream) {
  const auto moved_by = [&](int64_t bytes) {
    return multiples_of(bytes, {p.x, p.out},
                        {p.row_size * p.element_bytes, p.row_stride * p.element_bytes});
  };
  return moved_by(16)  ? gather_pieces<16>(p, stream)
         : moved_by(8) ? gather_pieces<8>(p, stream)
         : moved_by(4) ? gather_pieces<4>(p, stream)
                       : gather_pieces<2>(p, stream);
}

cudaError_t gather_tokens_bwd(const GatherTokensBwdParams& p, cudaStream_t stream) {
  if (const cudaError_t error = invert_index(p.inverse, stream); error != cudaSuccess) {
    return error;
  }
  return dispatch_pieces(
      p.dtype, {p.grad, p.grad_x}, {p.row_size, p.grad_stride}, [&]<typename T, int kElements>() {
        return launch("gather_tokens_bwd", gather_tokens_bwd_kernel<T, kElements>,
                      Tile::shape(p.inverse.num_rows, p.row_size / kElements), stream, p);
      });
}

cudaError_t scatter_tokens(const ScatterTokensParams& p, cudaStream_t stream) {
  if (const cudaError_t error = map_sources(p.inverse, stream); error != cudaSuccess) {
    return error;
  }
  return dispatch_pieces(p.dtype, {p.x, p.update, p.out}, {p.row_size, p.x_stride, p.update_stride},
                         [&]<typename T, int kElements>() {
                           return launch("scatter_tokens", scatter_tokens_kernel<T, kElements>,
                                         Tile::shape(p.inverse.num_rows, p.row_size / kElements),
                                         stream, p);
                         });
}

cudaError_t scatter_tokens_(const ScatterTokensInplaceParams& p, cudaStream_t stream) {
  return dispatch_pieces(p.dtype, {p.x, p.update}, {p.row_size, p.x_stride, p.update_stride},
                         [&]<typename T, int kElements>() {
                           return launch("scatter_tokens_",
                                         scatter_tokens_inplace_kernel<T, kElements>,
                                         Tile::shape(p.count, p.row_size / kElements), stream, p);
                         });
}

cudaError_t scatter_tokens_bwd(const ScatterTokensBwdParams& p, cudaStream_t stream) {
  return dispatch_pieces(
      p.dtype, {p.grad, p.update, p.grad_update}, {p.row_size, p.grad_stride, p.update_stride},
      [&]<typename T, int kElements>() {
        // A warp for a row of up to 8 KiB; longer ones get a block.
        const int64_t pieces = p.row_size / kElements;
        const int team = pieces <= 4 * kInFlight * kWarpSize ? kWarpSize : kThreads;
        return launch("scatter_tokens_bwd", scatter_tokens_bwd_kernel<T, kElements>,
                      teams_shape(p.count, team), stream, p, team);
      });
}

}  // namespace mor::cuda
