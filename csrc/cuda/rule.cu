// One rule for GPUs: compiled once for each header of csrc/rules, named on the command line.
#include LAYERFUSED_RULE_HEADER

#include "cuda/kernel.h"
#include "cuda/kernels.h"

namespace layerfused::cuda {
namespace {

using R = LAYERFUSED_RULE;

template <int WORDS>
__global__ void __launch_bounds__(THREADS, BLOCKS) run(__grid_constant__ device::Argument<Launch<WORDS>> launch) {
  Block<R, WORDS>(launch, device::shared<Shared<R>>()).run();
}

template <int WORDS>
cudaError_t start(const Launch<WORDS>& launch, int blocks, cudaStream_t stream) {
  return device::start(run<WORDS>, blocks, THREADS, launch, stream);
}

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)

const bool registered = [] {
  static const Kernels kernels{TEXT(LAYERFUSED_RULE), int(sizeof(R::Group) / sizeof(double)), R::sums + R::minima,
                               R::reports, reinterpret_cast<const void*>(run<FEW>), start<FEW>, start<MANY>};
  rules().push_back(&kernels);
  return true;
}();

}  // namespace
}  // namespace layerfused::cuda
