#include "attention/forward.cuh"

template cudaError_t mor::cuda::attention_of<float>(const AttentionParams&, cudaStream_t);
