#include "attention/paged.cuh"

template cudaError_t mor::cuda::paged_attention_of<mor::bfloat16>(const PagedParams&, cudaStream_t);
