// What blocks.cuh does, thread by thread on the CPU, for tests of the work that both share.
#pragma once

#include "cpu/tensor.h"

#include "cuda/tensor_table.h"

namespace forge {
namespace {

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

Tensor new_tensor(const Tensor&, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return forge::new_tensor(sizes, dtype);
}

template <class Work>
void run_blocks(const Work& work, int blocks, const Tensor&, const char*) {
  for (int block = 0; block < blocks; ++block) {
    for (int thread = 0; thread < tensor_table::kThreads; ++thread) work(block, thread);
  }
}

template <class Work>
void run_sums(const Work& work, int blocks, const Tensor&, const char*) {
  for (int block = 0; block < blocks; ++block) {
    double sum = 0;
    for (int thread = 0; thread < tensor_table::kThreads; ++thread) sum += work(block, thread);
    work.finish(block, sum);
  }
}

}  // namespace
}  // namespace forge
