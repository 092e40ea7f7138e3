// route_topk of sequences that may be longer than what one block holds, in any mixture of lengths.
//
// The rows are cut into chunks. Each digit is a kernel: blocks add the histogram of their chunk to
// that of the sequence, which the next kernel's blocks read, each for itself, to know the bucket.
// The last kernel counts each chunk's keys above the bucket and in it, adds up the counts of the
// chunks before by looking back, and writes the rows. Sequences that fit one block are left to
// blocks of their own, in the last kernel.
#include "route/topk.cuh"

namespace mor::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kItems = 8;
constexpr int64_t kChunk = kThreads * kItems;

// A chunk touches at most two long sequences. Each is a piece, worked on by a block.
static_assert(kChunk < kLongestShort);
constexpr int kPieces = 2;

// ---- scratch, all 0 at the start ----

// Of a long sequence.
struct LongSequence {
  int32_t histograms[3][kBins];  // of each digit
  Bucket buckets[3];             // before each digit
};

struct LongParams : RouteTopkParams {
  LongSequence* sequences;  // by first row / kLongestShort, in which any two differ
  uint64_t* states;         // [pieces], see look_back
  int32_t* ticket;          // [1]
  int64_t pieces;
};

LongParams params_of(const RouteTopkParams& p) {
  LongParams params{p, nullptr, nullptr, nullptr, ceil_div(p.rows, kChunk) * kPieces};
  params.sequences = static_cast<LongSequence*>(p.scratch);
  params.states = reinterpret_cast<uint64_t*>(params.sequences + p.rows / kLongestShort + 1);
  params.ticket = reinterpret_cast<int32_t*>(params.states + params.pieces);
  return params;
}

int64_t scratch_bytes(const LongParams& p) {
  return reinterpret_cast<char*>(p.ticket + 1) - static_cast<char*>(p.scratch);
}

// ---- pieces ----

struct Piece {
  Sequence sequence;
  int64_t chunk;
  int64_t begin, end;     // rows; none if this block has nothing to do
  LongSequence* scratch;  // of the sequence
};

// The last sequence that begins at or before the row, found by a warp, 32 places at once.
__device__ int64_t sequence_at(const LongParams& p, int64_t row) {
  int64_t low = 0, high = p.batch;
  while (high - low > 1) {
    const int64_t step = ceil_div(high - low, kWarpSize);
    const int64_t probe = low + lane_index() * step;
    const int before = popcount(ballot(probe < high && p.cu_seqlens[probe] <= row));
    low += std::max(before - 1, 0) * step;
    high = std::min(low + step, high);
  }
  return low;
}

// Piece 0 of a chunk is of the sequence that its first row is in, piece 1 of the one that begins
// later and goes on past the chunk.
__device__ Piece piece_of(const LongParams& p, int64_t number) {
  Piece piece;
  piece.chunk = number / kPieces;
  const bool later = number % kPieces == 1;
  const int64_t first = piece.chunk * kChunk, end = std::min(first + kChunk, p.rows);
  const Sequence s = sequence_of(p, sequence_at(p, later ? end - 1 : first));
  const bool mine = s.length > kLongestShort && (s.begin > first) == later;
  piece.sequence = s;
  piece.begin = std::max<int64_t>(first, s.begin);
  piece.end = mine ? std::min(end, int64_t{s.begin} + s.length) : 0;
  piece.scratch = p.sequences + s.begin / kLongestShort;
  return piece;
}

// The bucket before a pass, or after the last.
__device__ Bucket bucket_before(int pass, const Piece& piece, const Workspace& shared) {
  if (pass == 0) {
    return whole_bucket(piece.sequence);
  }
  const Bucket bucket = piece.scratch->buckets[pass - 1];
  if (bucket.settled != 0) {
    return bucket;
  }
  const int32_t* histogram = piece.scratch->histograms[pass - 1];
  return narrow<kThreads>(bucket, digit_shift(pass - 1), shared,
                          [&](int bin) { return histogram[bin]; });
}

// ---- a digit ----

// index holds -1 where wrong cu_seqlens leave it unwritten.
__device__ void clear_index(const LongParams& p) {
  constexpr int64_t kShare = kChunk / kPieces;
  const int64_t begin = block_index().x * kShare;
  const int64_t end = std::min(begin + kShare, p.total_out);
  for (int64_t i = begin + thread_index(); i < end; i += kThreads) {
    p.index[i] = -1;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) topk_digit(const LongParams p, int pass) {
  SharedArena arena;
  const Workspace shared(arena);
  if (pass == 0) {
    clear_index(p);
  }
  const Piece piece = piece_of(p, block_index().x);
  if (piece.begin >= piece.end) {
    return;
  }
  uint32_t keys[kItems];
  load_keys<T>(keys, p, piece.chunk * kChunk, piece.begin, piece.end);
  clear_histogram<kThreads>(shared);
  const Bucket bucket = bucket_before(pass, piece, shared);
  if (piece.begin == piece.sequence.begin && thread_index() == 0) {
    piece.scratch->buckets[pass] = bucket;
  }
  if (bucket.settled != 0) {
    return;
  }
  sync_threads();
  count_digits(keys, bucket, digit_shift(pass), shared);
  sync_threads();
  for (int bin = thread_index(); bin < kBins; bin += kThreads) {
    const int32_t count = shared.histogram[bin];
    if (count > 0) {
      atomic_add(&piece.scratch->histograms[pass][bin], count);
    }
  }
}

// ---- the rows ----

// A piece's state: two bits that say what it holds, then a tally.
constexpr uint64_t kOwn = uint64_t{1} << 62;    // of the piece alone
constexpr uint64_t kTotal = uint64_t{2} << 62;  // of all pieces of the sequence up to it
constexpr uint64_t kTallyBits = kOwn - 1;

__device__ void publish(uint64_t* state, uint64_t status, uint64_t tally) {
  if (lane_index() == 0) {
    store_release(state, status | (tally & kTallyBits));
  }
}

// The tally of the sequence's pieces before this one, which has the given ticket; by one warp. What
// it waits for are blocks of lower tickets, so they run.
__device__ Tally look_back(const LongParams& p, const Piece& piece, int64_t ticket,
                           const Tally& own) {
  const int64_t begin = piece.sequence.begin, first_chunk = begin / kChunk;
  const uint64_t packed = static_cast<uint64_t>(own.greater) << 31 | own.equal;
  uint64_t before = 0;
  if (piece.chunk > first_chunk) {
    publish(p.states + ticket, kOwn, packed);
  }
  uint32_t totals = piece.chunk > first_chunk ? 0 : kAllLanes;
  for (int64_t nearest = piece.chunk - 1; totals == 0; nearest -= kWarpSize) {
    const int64_t chunk = nearest - lane_index();
    uint64_t state = kTotal;
    if (chunk >= first_chunk) {
      const uint64_t* other = p.states + chunk * kPieces + (begin > chunk * kChunk ? 1 : 0);
      while ((state = load_acquire(other)) <= kTallyBits) {
        spin_pause();
      }
    }
    totals = ballot(state >= kTotal);
    const int last = totals == 0 ? kWarpSize : lowest_bit(totals);
    before += warp_sum(lane_index() <= last ? state & kTallyBits : 0);
  }
  publish(p.states + ticket, kTotal, before + packed);
  constexpr uint64_t kHalf = (uint64_t{1} << 31) - 1;
  return {static_cast<int32_t>(before >> 31 & kHalf), static_cast<int32_t>(before & kHalf)};
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) topk_rows(const LongParams p) {
  SharedArena arena;
  const Workspace shared(arena);
  const Shared<int32_t> shared_ticket = arena.take<int32_t>(1);
  const Shared<Tally> shared_before = arena.take<Tally>(1);
  if (thread_index() == 0) {
    shared_ticket[0] = atomic_add(p.ticket, 1);
  }
  sync_threads();
  const int32_t ticket = shared_ticket[0];

  if (ticket >= p.pieces) {
    const Sequence s = sequence_of(p, ticket - p.pieces);
    if (s.length <= kLongestShort) {
      select_rows<T, kThreads, kLongestShort / kThreads>(p, s, shared);
    }
    return;
  }
  const Piece piece = piece_of(p, ticket);
  if (piece.begin >= piece.end) {
    if (thread_index() < kWarpSize) {
      publish(p.states + ticket, kTotal, 0);
    }
    return;
  }
  uint32_t keys[kItems];
  load_keys<T>(keys, p, piece.chunk * kChunk, piece.begin, piece.end);
  const Bucket bucket = bucket_before(kDigits<T>, piece, shared);
  Tallies tallies = tally<kThreads>(keys, bucket, shared);
  if (thread_index() < kWarpSize) {
    const Tally before = look_back(p, piece, ticket, tallies.block);
    if (lane_index() == 0) {
      shared_before[0] = before;
    }
  }
  sync_threads();
  const Tally chunks_before = shared_before[0];
  tallies.before.greater += chunks_before.greater;
  tallies.before.equal += chunks_before.equal;
  emit(keys, bucket, tallies.before, tallies.own, p, piece.sequence, piece.chunk * kChunk);
}

// ---- launch ----

template <typename T>
cudaError_t launch_long(const LongParams& p, cudaStream_t stream) {
  cudaError_t error = cudaMemsetAsync(p.scratch, 0, static_cast<size_t>(scratch_bytes(p)), stream);
  const LaunchShape digit{{static_cast<uint32_t>(p.pieces), 1, 1}, kThreads, Workspace::bytes()};
  for (int pass = 0; pass < kDigits<T> && error == cudaSuccess; ++pass) {
    error = launch("route_topk_digit", topk_digit<T>, digit, stream, p, pass);
  }
  if (error != cudaSuccess) {
    return error;
  }
  const LaunchShape rows{{static_cast<uint32_t>(p.pieces + p.batch), 1, 1},
                         kThreads,
                         Workspace::bytes() + shared_bytes<int32_t>(1) + shared_bytes<Tally>(1)};
  return launch("route_topk_rows", topk_rows<T>, rows, stream, p);
}

}  // namespace

int64_t route_topk_scratch_bytes(const RouteTopkParams& p) {
  return p.max_seqlen > kLongestShort ? scratch_bytes(params_of(p)) : 0;
}

cudaError_t route_topk_long(const RouteTopkParams& p, cudaStream_t stream) {
  return dispatch_data_dtype(p.dtype,
                             [&]<typename T>() { return launch_long<T>(params_of(p), stream); });
}

}  // namespace mor::cuda
