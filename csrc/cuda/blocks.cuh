// Runs the work of a thread in every thread of a grid. `Work` is the kernel's one argument.
#pragma once

#include "cuda/tensor.h"

#include "cuda/tensor_table.h"

namespace forge {
namespace {

template <class Work>
__global__ void __launch_bounds__(tensor_table::kThreads) blocks_kernel(const __grid_constant__ Work work) {
  work(static_cast<int>(blockIdx.x), static_cast<int>(threadIdx.x));
}

// work(block, thread) for every thread of `blocks` blocks.
template <class Work>
void run_blocks(const Work& work, int blocks, const Tensor& on, const char* op) {
  static_assert(sizeof(Work) <= tensor_table::kArgumentBytes);
  if (blocks == 0) return;
  blocks_kernel<<<blocks, tensor_table::kThreads, 0, current_stream(on)>>>(work);
  check_launch(op);
}

template <class Work>
__global__ void __launch_bounds__(tensor_table::kThreads) sums_kernel(const __grid_constant__ Work work) {
  constexpr int kWarp = 32, kWarps = tensor_table::kThreads / kWarp;
  __shared__ double of_warps[kWarps];
  double sum = work(static_cast<int>(blockIdx.x), static_cast<int>(threadIdx.x));
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) sum += __shfl_down_sync(0xffffffffu, sum, distance);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) sum += of_warps[warp];
  work.finish(static_cast<int>(blockIdx.x), sum);
}

// work.finish(block, sum of work(block, thread) over the threads), added up in a fixed order.
template <class Work>
void run_sums(const Work& work, int blocks, const Tensor& on, const char* op) {
  static_assert(sizeof(Work) <= tensor_table::kArgumentBytes);
  if (blocks == 0) return;
  sums_kernel<<<blocks, tensor_table::kThreads, 0, current_stream(on)>>>(work);
  check_launch(op);
}

}  // namespace
}  // namespace forge
