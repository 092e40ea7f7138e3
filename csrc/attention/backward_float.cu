#include "attention/backward.cuh"

template cudaError_t mor::cuda::attention_bwd_of<float>(const AttentionBwdParams&, void*,
                                                        cudaStream_t);
