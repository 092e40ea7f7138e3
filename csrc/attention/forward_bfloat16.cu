#include "attention/forward.cuh"

template cudaError_t mor::cuda::attention_of<mor::bfloat16>(const AttentionParams&, cudaStream_t);
