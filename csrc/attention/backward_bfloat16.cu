#include "attention/backward.cuh"

template cudaError_t mor::cuda::attention_bwd_of<mor::bfloat16>(const AttentionBwdParams&, void*,
                                                                cudaStream_t);
