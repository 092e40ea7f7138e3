#include "attention/paged.cuh"

template cudaError_t mor::cuda::paged_attention_of<float>(const PagedParams&, cudaStream_t);
