// What a rule becomes on a GPU: its name and its kernels.
#pragma once
#include <cuda_runtime_api.h>

#include <vector>

#include "cuda/launch.h"

namespace layerfused::cuda {

struct Kernels {
  const char* name;
  int hyper, stats, reports;
  const void* kernel;  // to ask the driver about
  cudaError_t (*few)(const Launch<FEW>&, int blocks, cudaStream_t);
  cudaError_t (*many)(const Launch<MANY>&, int blocks, cudaStream_t);
};

std::vector<const Kernels*>& rules();  // filled by rule.cu, once per header in csrc/rules

}  // namespace layerfused::cuda
