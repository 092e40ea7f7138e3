// What the host hands to the kernels of the compact family, the same on every device.
#pragma once

#include "common/types.h"

namespace mor {

struct CompactDepthParams {
  const int32_t* depth;       // [rows]
  const int32_t* cu_seqlens;  // [batch + 1]
  int32_t* index;             // [recursions, rows]
  int32_t* cu_seqlens_out;    // [recursions, batch + 1]
  int64_t rows, batch, recursions;
  void* scratch = nullptr;  // CUDA: cuda::compact_depth_scratch_bytes
};

struct GatherTokensParams {
  const void* x;         // [num_rows, row_size], rows row_stride elements apart
  const int32_t* index;  // [count], -1 gives a zero row
  void* out;             // [count, row_size]
  int64_t num_rows, count, row_size, row_stride;
  int64_t element_bytes;
};

// The entries of an index by the row that they name: first[row], then next[entry], until -1.
// Entries of a row come in ascending order. The caller gives the memory, the device fills it.
struct InverseIndex {
  const int32_t* index;  // [count], -1 names no row
  int32_t* first;        // [num_rows + 1]; the last is the CUDA kernels' own, see has_repeats
  int32_t* next;         // [count]
  int64_t num_rows, count;
};

struct GatherTokensBwdParams {
  const void* grad;  // [count, row_size], rows grad_stride elements apart
  InverseIndex inverse;
  void* grad_x;  // [num_rows, row_size]
  int64_t row_size, grad_stride;
  DType dtype;
};

// Factors on rows, of the data's dtype or fp32; without data every factor is 1.
struct Gate {
  const void* data;  // [count]
  DType dtype;
};

struct ScatterTokensParams {
  const void* x;       // [num_rows, row_size], rows x_stride elements apart
  const void* update;  // [count, row_size], rows update_stride elements apart
  Gate gate;
  InverseIndex inverse;  // of unique entries; on CUDA as cuda::map_sources leaves it
  void* out;             // [num_rows, row_size]
  int64_t row_size, x_stride, update_stride;
  DType dtype;
};

struct ScatterTokensInplaceParams {
  void* x;             // [num_rows, row_size], rows x_stride elements apart
  const void* update;  // [count, row_size], rows update_stride elements apart
  Gate gate;
  const int32_t* index;  // [count], unique, -1 is skipped
  int64_t num_rows, count, row_size, x_stride, update_stride;
  DType dtype;
};

struct ScatterTokensBwdParams {
  const void* grad;    // [num_rows, row_size], rows grad_stride elements apart
  const void* update;  // [count, row_size], rows update_stride elements apart, or null
  Gate gate;
  const int32_t* index;  // [count], -1 gets zero gradients
  void* grad_update;     // [count, row_size]
  void* grad_gate;       // [count] of the gate's dtype, written if there is an update
  int64_t num_rows, count, row_size, grad_stride, update_stride;
  DType dtype;
};

struct GatherRmsNormParams {
  const void* x;         // [num_rows, row_size], rows x_stride elements apart
  const int32_t* index;  // [count], -1 gives zeros
  const void* weight;    // [row_size]
  void* rows;            // [count, row_size]
  void* normed;          // [count, row_size]
  void* rstd;            // [count] of the accumulate type
  int64_t num_rows, count, row_size, x_stride;
  double eps;
  DType dtype, weight_dtype;
};

struct GatherRmsNormBwdParams {
  const void* grad_rows;    // [count, row_size], or null
  const void* grad_normed;  // [count, row_size], or null
  const void* rows;         // [count, row_size]
  const void* rstd;         // [count] of the accumulate type
  const void* weight;       // [row_size]
  InverseIndex inverse;
  void* scratch;      // [blocks, 2, row_size] of the accumulate type
  void* grad_x;       // [num_rows, row_size]
  void* grad_weight;  // [row_size]
  int64_t row_size, blocks;
  DType dtype, weight_dtype;
};

}  // namespace mor
