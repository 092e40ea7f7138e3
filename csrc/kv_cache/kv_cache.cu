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
constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

// Lanes, with sizes that fit the 32-bit numbers of the tables.
struct LaneTable {
  const int32_t *block_table, *cache_seqlens, *cu_seqlens;
  int32_t lanes;
  uint32_t max_blocks, block_size, num_blocks;
  int64_t lane_stride;  // of block_table
};

// The params of all three ops. Query and key are rotated, key and value are appended, by what the
// op does; a tensor that it does not have is one of 0 heads.
struct Params {
  Heads query{}, key{}, value{};
  void *query_out = nullptr, *key_out = nullptr;  // [tokens, heads, head_dim], contiguous
  RotaryTable table{};
  CacheBlocks key_cache{}, value_cache{};
  LaneTable lanes{};
  int64_t tokens = 0, head_dim = 0;
};

// How the threads of a warp share out heads: `width` of them stand side by side along a head, each
// with the vector at its column, `rows` times for as many heads, and each does so for
// kHeadsPerThread heads. Grid: [tokens / kWarps, heads / (rows kHeadsPerThread), columns / width].
struct Split {
  static constexpr int kShift = 16;

  int32_t columns;  // of a head, or of each of its halves where it is rotated
  int32_t width, rows;
  int32_t inverse;  // thread / width = thread * inverse >> kShift
};

// ---- kernel ----

struct Slot {
  bool found = false;
  uint32_t block = 0, entry = 0;
};

// The lane that holds the token: the number of lanes that end at or before it. All threads of a
// warp search, 32 elements a step, within bounds whatever cu_seqlens holds.
__device__ int find_lane(const LaneTable& p, int32_t token) {
  const int32_t* ends = p.cu_seqlens + 1;
  int begin = 0;
  for (int count = p.lanes; count > 0;) {
    const int step = (count - 1) / kWarpSize + 1;
    const int64_t last = int64_t{lane_index() + 1} * step - 1;  // of this thread's share
    const int shares = popcount(ballot(last < count && ends[begin + last] <= token));
    begin += shares * step;
    count = std::min(count - shares * step, step - 1);
  }
  return begin;
}

// What is out of range gives no slot.
__device__ Slot find_slot(const LaneTable& p, int lane, int32_t token) {
  if (lane >= p.lanes) {
    return {};
  }
  const int32_t start = p.cu_seqlens[lane], held = p.cache_seqlens[lane];
  if (start < 0 || start > token || held < 0) {
    return {};
  }
  const uint32_t entry = static_cast<uint32_t>(held) + static_cast<uint32_t>(token - start);
  const uint32_t logical = entry / p.block_size;
  if (logical >= p.max_blocks) {
    return {};
  }
  const auto block = static_cast<uint32_t>(p.block_table[lane * p.lane_stride + logical]);
  return {block < p.num_blocks, block, entry - logical * p.block_size};
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

// The heads that one thread moves, of those of query, key and value counted through, and its column
// in them.
template <bool kRotate, bool kAppend>
struct Share {
  int first, step, column;
  int keys, values, end;  // the first head of the key, of the value, of nothing
  bool appends;           // whether the warp has heads that go to the cache

  __device__ Share(const Params& p, const Split& split) {
    const auto part = static_cast<int>(block_index().y), chunk = static_cast<int>(block_index().z);
    const int row = lane_index() * split.inverse >> Split::kShift;
    column = chunk * split.width + lane_index() - row * split.width;
    keys = kRotate ? static_cast<int>(p.query.heads) : 0;
    values = keys + static_cast<int>(p.key.heads);
    end = kAppend ? values + static_cast<int>(p.value.heads) : values;
    step = split.rows;
    const int low = part * step * kHeadsPerThread, high = low + step * kHeadsPerThread;
    first = row < split.rows && column < split.columns ? low + row : end;
    appends = kAppend && high > keys;
  }

  // The thread's i-th head, among all and in its own tensor.
  __device__ int head(int i) const { return first + i * step; }
  __device__ int own_head(int i) const { return head(i) - pick(i, 0, keys, values); }

  // That of the tensor whose head it is.
  template <typename V>
  __device__ V pick(int i, V query, V key, V value) const {
    return kRotate && head(i) < keys ? query : !kAppend || head(i) < values ? key : value;
  }
};

template <typename T>
__device__ const T* token_of(const Heads& x, int64_t token) {
  return static_cast<const T*>(x.data) + token * x.token_stride;
}

template <typename T>
__device__ T* entry_of(const CacheBlocks& cache, Slot slot) {
  return static_cast<T*>(cache.data) + slot.block * cache.block_stride +
         slot.entry * cache.entry_stride;
}

template <typename T, int kVec, bool kRotate, bool kAppend>
__global__ void __launch_bounds__(kWarps* kWarpSize, kBlocksPerSm)
    move_heads(const __grid_constant__ Params p, const __grid_constant__ Split split) {
  using Vec = Raw<T, kVec>;
  constexpr int kHalves = kRotate ? 2 : 1;
  const int64_t token = int64_t{block_index().x} * kWarps + thread_index() / kWarpSize;
  if (token >= p.tokens) {
    return;  // the whole warp
  }
  const Share<kRotate, kAppend> share(p, split);
  const int offset = share.column * kVec, half_offset = split.columns * kVec;

  // Loads that wait for nothing come first, then those that wait for them, in turns.
  [[maybe_unused]] const int64_t position = kRotate ? p.table.positions[token] : 0;
  Vec x[kHeadsPerThread][kHalves];
  const T *query = token_of<T>(p.query, token), *key = token_of<T>(p.key, token),
          *value = token_of<T>(p.value, token);
#pragma unroll
  for (int i = 0; i < kHeadsPerThread; ++i) {
    if (share.head(i) < share.end) {
      const int64_t stride =
          share.pick(i, p.query.head_stride, p.key.head_stride, p.value.head_stride);
      const T* from = share.pick(i, query, key, value) + share.own_head(i) * stride + offset;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        x[i][half] = *reinterpret_cast<const Vec*>(from + half * half_offset);
      }
    }
  }
  const auto token32 = static_cast<int32_t>(token < kMaxInt32 ? token : kMaxInt32);
  const int lane = share.appends ? find_lane(p.lanes, token32) : 0;
  [[maybe_unused]] float cos[kVec], sin[kVec];
  if constexpr (kRotate) {
    // A position that the tables do not have gives NaN, so that it shows.
    const RotaryTable& t = p.table;
    const bool known = position >= 0 && position < t.max_positions && share.first < share.end;
    const auto angles = [&](const void* table, int64_t stride) {
      return known ? static_cast<const float*>(table) + position * stride + offset : nullptr;
    };
    load_angles(cos, angles(t.cos, t.cos_stride));
    load_angles(sin, angles(t.sin, t.sin_stride));
  }

  T *query_to = nullptr, *key_to = nullptr, *value_to = nullptr;
  int end = share.end;  // of the heads that have a place to go to
  if constexpr (kRotate) {
    query_to = static_cast<T*>(p.query_out) + token * p.query.heads * p.head_dim;
  }
  if constexpr (kAppend) {
    const Slot slot = share.appends ? find_slot(p.lanes, lane, token32) : Slot{};
    if (slot.found) {
      key_to = entry_of<T>(p.key_cache, slot);
      value_to = entry_of<T>(p.value_cache, slot);
    } else {
      end = share.keys;
    }
  } else {
    key_to = static_cast<T*>(p.key_out) + token * p.key.heads * p.head_dim;
  }
#pragma unroll
  for (int i = 0; i < kHeadsPerThread; ++i) {
    if (share.head(i) < end) {
      if constexpr (kRotate) {
        if (share.head(i) < share.values) {
          rotate<T, kVec>(x[i][0], x[i][1], cos, sin);
        }
      }
      T* to = share.pick(i, query_to, key_to, value_to) +
              int64_t{share.own_head(i)} * static_cast<int32_t>(p.head_dim) + offset;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        *reinterpret_cast<Vec*>(to + half * half_offset) = x[i][half];
      }
    }
  }
}

// ---- launch ----

template <typename T, int kVec, bool kRotate, bool kAppend>
cudaError_t launch_moves(const char* name, const Params& p, cudaStream_t stream) {
  const int64_t columns = p.head_dim / (kRotate ? 2 : 1) / kVec;
  if (columns == 0) {
    return cudaSuccess;
  }
  const int64_t width = std::min<int64_t>(columns, kWarpSize), rows = kWarpSize / width;
  const int64_t heads = p.query.heads + p.key.heads + p.value.heads;
  const auto blocks = [](int64_t count, int64_t each) {  // too many for 32 bits are for CUDA too
    constexpr int64_t kMost = std::numeric_limits<uint32_t>::max();
    return static_cast<uint32_t>(std::min(ceil_div(count, each), kMost));
  };
  const LaunchShape shape{
      {blocks(p.tokens, kWarps), blocks(heads, rows * kHeadsPerThread), blocks(columns, width)},
      kWarps * kWarpSize};
  const Split split{.columns = static_cast<int32_t>(columns),
                    .width = static_cast<int32_t>(width),
                    .rows = static_cast<int32_t>(rows),
                    .inverse = static_cast<int32_t>(ceil_div(1 << Split::kShift, width))};
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

// Entries and blocks have numbers below 2^32, so that a larger size makes no difference; 2^31 lanes
// would need cu_seqlens of 8 GB.
LaneTable table_of(const Lanes& lanes) {
  const auto at_most = [](int64_t size, int64_t limit) {
    return static_cast<uint32_t>(std::min(size, limit));
  };
  constexpr int64_t kMaxUint32 = std::numeric_limits<uint32_t>::max();
  return {.block_table = lanes.block_table,
          .cache_seqlens = lanes.cache_seqlens,
          .cu_seqlens = lanes.cu_seqlens,
          .lanes = static_cast<int32_t>(std::min(lanes.lanes, kMaxInt32)),
          .max_blocks = at_most(lanes.max_blocks, kMaxUint32),
          .block_size = at_most(lanes.block_size, kMaxUint32),
          .num_blocks = at_most(lanes.num_blocks, kMaxInt32 + 1),
          .lane_stride = lanes.max_blocks};
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
                      .lanes = table_of(p.lanes),
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
                      .lanes = table_of(p.lanes),
                      .tokens = p.tokens,
                      .head_dim = p.head_dim};
  return dispatch_data_dtype(p.dtype, [&]<typename T>() {
    return dispatch_width<T, true, true>("rotary_kv_append", params, stream);
  });
}

}  // namespace mor::cuda
