// The one kernel of the kv_cache family: takes the heads of tokens from a projection to an output
// or to the cache, rotated or as they are. A warp takes a token, or a part of its heads, and finds
// the token's slot while the heads are on their way from memory. "Lane" here is a list of the
// cache, and what a warp has 32 of are its threads.
#include <algorithm>
#include <cmath>
#include <limits>

#include "common/launch.cuh"
#include "kv_cache/launch.h"

namespace mor::cuda {
namespace {

// ---- traits ----

constexpr int kWarps = 4;           // of a block, each with a token of its own
constexpr int kHeadsPerThread = 4;  // loads under way at once, of one vector each or of two halves
constexpr int kBlocksPerSm = 6;     // so at most 80 registers

// The params of all three ops. Query and key are rotated, key and value are appended, by what the
// op does; a tensor that it does not have is one of 0 heads.
struct Params {
  Heads query{}, key{}, value{};
  void *query_out = nullptr, *key_out = nullptr;  // [tokens, heads, head_dim], contiguous
  RotaryTable table{};
  CacheBlocks key_cache{}, value_cache{};
  Lanes lanes{};
  int64_t tokens = 0, head_dim = 0;
};

// How the threads of a warp share out heads: `width` of them stand side by side along a head, each
// with the vector at its column, `rows` times for as many heads, and each does so for
// kHeadsPerThread heads. A head of more columns takes `chunks` warps, a token `parts`.
struct Split {
  int64_t columns;  // of a head, or of each of its halves where it is rotated
  int32_t width, rows;
  uint32_t chunks, parts;
};

// ---- kernel ----

struct Slot {
  int64_t block = -1, entry = 0;  // block -1: none
};

// The lane that holds the token: the number of lanes that end at or before it. All threads of a
// warp search, 32 elements a step, within bounds whatever cu_seqlens holds.
__device__ int64_t find_lane(const Lanes& p, int64_t token) {
  const int32_t* ends = p.cu_seqlens + 1;
  int64_t begin = 0;
  for (int64_t count = p.lanes; count > 0;) {
    const int64_t step = ceil_div(count, kWarpSize);
    const int64_t last = (lane_index() + 1) * step - 1;  // of this thread's share
    const int64_t shares = popcount(ballot(last < count && ends[begin + last] <= token));
    begin += shares * step;
    const int64_t rest = count - shares * step;
    count = rest < step ? rest : step - 1;
  }
  return begin;
}

// What is out of range gives no slot.
__device__ Slot find_slot(const Lanes& p, int64_t lane, int64_t token) {
  if (lane >= p.lanes || p.cu_seqlens[lane] > token) {
    return {};
  }
  const int64_t held = p.cache_seqlens[lane];
  const int64_t entry = held + token - p.cu_seqlens[lane];
  const int64_t logical = entry / p.block_size;
  if (held < 0 || logical >= p.max_blocks) {
    return {};
  }
  const int64_t block = p.block_table[lane * p.max_blocks + logical];
  if (block < 0 || block >= p.num_blocks) {
    return {};
  }
  return {block, entry - logical * p.block_size};
}

// A vector of cosines or sines; NaN from nowhere.
template <int kVec>
__device__ void load_angles(float (&to)[kVec], const float* from) {
  constexpr int kLoad = kVec < 4 ? kVec : 4;
  using Load = Vector<float, kLoad>;
#pragma unroll
  for (int i = 0; i < kVec; i += kLoad) {
    Load part{};
    if (from != nullptr) {
      part = *reinterpret_cast<const Load*>(from + i);
    }
#pragma unroll
    for (int j = 0; j < kLoad; ++j) {
      to[i + j] = from != nullptr ? part[j] : std::numeric_limits<float>::quiet_NaN();
    }
  }
}

// A vector of T on its way: words, because a register holds one 16-bit element alone otherwise.
template <typename T, int kVec>
using Raw = std::conditional_t<kVec == kVector16<T>, Vector<uint32_t, 4>, Vector<T, kVec>>;

// [x1, x2] = [x1 cos - x2 sin, x2 cos + x1 sin]. The fma are spelt out so that rotary and
// rotary_kv_append give the same bits.
template <typename T, int kVec>
__device__ void rotate(Raw<T, kVec>& raw1, Raw<T, kVec>& raw2, const float (&cos)[kVec],
                       const float (&sin)[kVec]) {
  auto x1 = std::bit_cast<Vector<T, kVec>>(raw1), x2 = std::bit_cast<Vector<T, kVec>>(raw2);
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const float a = to_float(x1[i]), b = to_float(x2[i]);
    x1[i] = from_float<T>(std::fma(a, cos[i], -(b * sin[i])));
    x2[i] = from_float<T>(std::fma(b, cos[i], a * sin[i]));
  }
  raw1 = std::bit_cast<Raw<T, kVec>>(x1);
  raw2 = std::bit_cast<Raw<T, kVec>>(x2);
}

template <typename T>
__device__ const T* head_of(const Heads& x, int64_t token, int64_t head) {
  return static_cast<const T*>(x.data) + token * x.token_stride + head * x.head_stride;
}

template <typename T>
__device__ T* head_in(const CacheBlocks& cache, Slot slot, int64_t head, int64_t head_dim) {
  return static_cast<T*>(cache.data) + slot.block * cache.block_stride +
         slot.entry * cache.entry_stride + head * head_dim;
}

template <typename T, int kVec, bool kRotate, bool kAppend>
__global__ void __launch_bounds__(kWarps* kWarpSize, kBlocksPerSm)
    move_heads(const __grid_constant__ Params p, const __grid_constant__ Split split) {
  using Vec = Raw<T, kVec>;
  constexpr int kHalves = kRotate ? 2 : 1;

  const uint32_t part = block_index().x % split.parts;
  const int64_t group = block_index().x / split.parts;
  const int64_t token = group * kWarps + thread_index() / kWarpSize;
  if (token >= p.tokens) {
    return;  // the whole warp
  }
  const int row = lane_index() / split.width;
  const int64_t column =
      int64_t{part % split.chunks} * split.width + (lane_index() - row * split.width);
  const int64_t first = int64_t{part / split.chunks} * split.rows * kHeadsPerThread;
  const int64_t keys = p.query.heads, values = keys + p.key.heads, heads = values + p.value.heads;
  const auto head = [&](int i) { return first + i * split.rows + row; };
  const auto mine = [&](int i) {
    return row < split.rows && column < split.columns && head(i) < heads;
  };

  // The loads that wait for nothing come first, then those that wait for them, in turns.
  [[maybe_unused]] const int64_t position = kRotate ? p.table.positions[token] : 0;
  Vec x[kHeadsPerThread][kHalves];
#pragma unroll
  for (int i = 0; i < kHeadsPerThread; ++i) {
    if (mine(i)) {
      const int64_t h = head(i);
      const T* from = h < keys     ? head_of<T>(p.query, token, h)
                      : h < values ? head_of<T>(p.key, token, h - keys)
                                   : head_of<T>(p.value, token, h - values);
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        x[i][half] = *reinterpret_cast<const Vec*>(from + (half * split.columns + column) * kVec);
      }
    }
  }
  const bool appends = kAppend && first + split.rows * kHeadsPerThread > keys;  // the whole warp
  const int64_t lane = appends ? find_lane(p.lanes, token) : 0;
  [[maybe_unused]] float cos[kVec], sin[kVec];
  if constexpr (kRotate) {
    // A position that the tables do not have gives NaN, so that it shows.
    const RotaryTable& t = p.table;
    const bool known = position >= 0 && position < t.max_positions && mine(0);
    const auto angles = [&](const void* table, int64_t stride) {
      const auto* from = static_cast<const float*>(table);
      return known ? from + position * stride + column * kVec : nullptr;
    };
    load_angles(cos, angles(t.cos, t.cos_stride));
    load_angles(sin, angles(t.sin, t.sin_stride));
  }
  const Slot slot = appends ? find_slot(p.lanes, lane, token) : Slot{};

  const auto place = [&](int64_t h) -> T* {
    if (h < keys) {
      return static_cast<T*>(p.query_out) + (token * keys + h) * p.head_dim;
    }
    if (!kAppend) {
      return static_cast<T*>(p.key_out) + (token * p.key.heads + h - keys) * p.head_dim;
    }
    if (slot.block < 0) {
      return nullptr;
    }
    return h < values ? head_in<T>(p.key_cache, slot, h - keys, p.head_dim)
                      : head_in<T>(p.value_cache, slot, h - values, p.head_dim);
  };
#pragma unroll
  for (int i = 0; i < kHeadsPerThread; ++i) {
    T* to = mine(i) ? place(head(i)) : nullptr;
    if (to != nullptr) {
      if constexpr (kRotate) {
        if (head(i) < values) {
          rotate<T, kVec>(x[i][0], x[i][1], cos, sin);
        }
      }
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        *reinterpret_cast<Vec*>(to + (half * split.columns + column) * kVec) = x[i][half];
      }
    }
  }
}

// ---- launch ----

template <typename T, int kVec, bool kRotate, bool kAppend>
cudaError_t launch_moves(const char* name, const Params& p, cudaStream_t stream) {
  const int64_t columns = p.head_dim / (kRotate ? 2 : 1) / kVec;
  const int64_t heads = p.query.heads + p.key.heads + p.value.heads;
  if (p.tokens == 0 || columns == 0 || heads == 0) {
    return cudaSuccess;
  }
  const int64_t width = std::min<int64_t>(columns, kWarpSize);
  const int64_t chunks = ceil_div(columns, width);
  const int64_t rows = kWarpSize / width;
  const int64_t parts = chunks * ceil_div(heads, rows * kHeadsPerThread);
  constexpr int64_t kTooMany = std::numeric_limits<uint32_t>::max();  // CUDA says so, then
  const int64_t blocks = std::min(ceil_div(p.tokens, kWarps) * parts, kTooMany);
  const Split split{.columns = columns,
                    .width = static_cast<int32_t>(width),
                    .rows = static_cast<int32_t>(rows),
                    .chunks = static_cast<uint32_t>(chunks),
                    .parts = static_cast<uint32_t>(parts)};
  const LaunchShape shape{{static_cast<uint32_t>(blocks), 1, 1}, kWarps * kWarpSize};
  return launch(name, move_heads<T, kVec, kRotate, kAppend>, shape, stream, p, split);
}

// ---- dispatch ----

constexpr int64_t kAccess = 16;  // bytes

bool aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kAccess == 0;
}

bool aligned(const Heads& x, int64_t element) {
  return aligned(x.data) && x.token_stride * element % kAccess == 0 &&
         (x.heads <= 1 || x.head_stride * element % kAccess == 0);
}

bool aligned(const CacheBlocks& cache, int64_t element) {
  return aligned(cache.data) && cache.block_stride * element % kAccess == 0 &&
         cache.entry_stride * element % kAccess == 0;
}

bool aligned(const RotaryTable& table) {
  const int64_t strides = table.cos_stride | table.sin_stride;
  return aligned(table.cos) && aligned(table.sin) &&
         strides * static_cast<int64_t>(sizeof(float)) % kAccess == 0;
}

// Whether every head and every row of the tables can be read and written by 16 bytes. Tensors that
// an op does not have are null.
bool aligned(const Params& p, int64_t element, bool rotate) {
  return p.head_dim * element % (rotate ? 2 * kAccess : kAccess) == 0 &&
         aligned(p.query, element) && aligned(p.key, element) && aligned(p.value, element) &&
         aligned(p.query_out) && aligned(p.key_out) && aligned(p.table) &&
         aligned(p.key_cache, element) && aligned(p.value_cache, element);
}

template <typename T, bool kRotate, bool kAppend>
cudaError_t dispatch_width(const char* name, const Params& p, cudaStream_t stream) {
  return aligned(p, sizeof(T), kRotate)
             ? launch_moves<T, kVector16<T>, kRotate, kAppend>(name, p, stream)
             : launch_moves<T, 1, kRotate, kAppend>(name, p, stream);
}

}  // namespace

cudaError_t rotary(const RotaryParams& p, cudaStream_t stream) {
  const Params params{.query = p.query,
                      .key = p.key,
                      .query_out = p.query_out,
                      .key_out = p.key_out,
                      .table = p.table,
                      .tokens = p.tokens,
                      .head_dim = p.head_dim};
  return dispatch_data_dtype(p.dtype, [&]<typename T>() {
    return dispatch_width<T, /*kRotate=*/true, /*kAppend=*/false>("rotary", params, stream);
  });
}

cudaError_t kv_append(const KvAppendParams& p, cudaStream_t stream) {
  const Params params{.key = p.key,
                      .value = p.value,
                      .key_cache = p.key_cache,
                      .value_cache = p.value_cache,
                      .lanes = p.lanes,
                      .tokens = p.tokens,
                      .head_dim = p.head_dim};
  // Any type of the element's size: copies are bit for bit.
  return p.element_bytes == 2 ? dispatch_width<bfloat16, false, true>("kv_append", params, stream)
                              : dispatch_width<float, false, true>("kv_append", params, stream);
}

cudaError_t rotary_kv_append(const RotaryKvAppendParams& p, cudaStream_t stream) {
  const Params params{.query = p.query,
                      .key = p.key,
                      .value = p.value,
                      .query_out = p.query_out,
                      .table = p.table,
                      .key_cache = p.key_cache,
                      .value_cache = p.value_cache,
                      .lanes = p.lanes,
                      .tokens = p.tokens,
                      .head_dim = p.head_dim};
  return dispatch_data_dtype(p.dtype, [&]<typename T>() {
    return dispatch_width<T, true, true>("rotary_kv_append", params, stream);
  });
}

}  // namespace mor::cuda
