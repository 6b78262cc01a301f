// run_rows on GPUs with clusters: a job (logit_rows.h) over rows of logits, each read from memory once.
//
// A cluster of up to eight blocks keeps a row in its shared memory: a thread copies its own packs there (cp.async), reads
// only those, and fetches the same packs of its next row into their place as soon as it has written their gradient. So
// nothing but the sums of a row passes between threads. Each warp leaves its part in the shared memory of every block of
// the cluster; one cluster barrier; each warp joins all parts in the same order, so all threads know the same row.
//
//     inbox of row i      written before barrier i, read after it
//     inbox of row i + 1  is the other one: nobody writes the first again before barrier i + 1, which every thread
//                         reaches only after it has read the inbox of row i
//     gradient of row i   written after barrier i, over logits that every thread read before it
//
// The arithmetic is in logit_row.h and in the jobs and is tested on the CPU. No atomics: results repeat bit for bit.
#pragma once

#include <cooperative_groups.h>

#include "cuda/tensor.h"

#include "cuda/logit_rows.h"

namespace forge {
namespace {

using logit_row::kMaxCluster;
using logit_row::kPack;
using logit_row::kThreads;
using logit_row::kWarp;
using logit_row::kWarps;
using logit_row::Logits;
using logit_row::RowGradient;
using logit_row::RowPart;
using logit_row::Slice;
using logit_row::Wanted;

constexpr int64_t kSharedSums = 1280;  // that fit beside a row; more of them stay in global memory

template <class T>
__device__ void store(T* to, const Logits& d, int size) {
  if (size == kPack) {
    Pack<T, kPack> pack;
#pragma unroll
    for (int v = 0; v < kPack; ++v) pack.values[v] = from_float<T>(d.v[v]);
    *reinterpret_cast<Pack<T, kPack>*>(to) = pack;
  } else {
#pragma unroll
    for (int v = 0; v < kPack; ++v) {
      if (v < size) to[v] = from_float<T>(d.v[v]);
    }
  }
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// Logits of the pack that lie inside the vocabulary.
__device__ int size_of(int pack, int vocab) { return vocab - pack * kPack < kPack ? vocab - pack * kPack : kPack; }

// Starts the copy of a pack; what lies behind the end of the vocabulary is filled with zeros, not read.
__device__ void fetch(Logits* to, const float* row, int pack, int vocab) {
  const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(row + pack * kPack),
               "r"(size_of(pack, vocab) * static_cast<int>(sizeof(float)))
               : "memory");
}

__device__ void wait_for_own_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ RowPart from_lane(const RowPart& part, int lane) {
  RowPart other;
  other.top_before = __shfl_sync(0xffffffffu, part.top_before, lane);
  other.top_from = __shfl_sync(0xffffffffu, part.top_from, lane);
  other.exp_sum = __shfl_sync(0xffffffffu, part.exp_sum, lane);
  other.sum = __shfl_sync(0xffffffffu, part.sum, lane);
  return other;
}

// The parts of a warp's lanes joined; all lanes return what lane 0 has.
template <Wanted kWanted>
__device__ RowPart joined_warp(RowPart part) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    part = logit_row::joined<kWanted>(part, from_lane(part, (lane + distance) % kWarp));
  }
  return from_lane(part, 0);
}

template <class T, class Job>
__global__ void __launch_bounds__(kThreads, 2) rows_kernel(const Job job, const LogitRows a) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ RowPart inbox[2][kMaxCluster * kWarps];
  const auto cluster = cooperative_groups::this_cluster();
  const int blocks = static_cast<int>(cluster.num_blocks()), rank = static_cast<int>(cluster.block_rank());
  const int clusters = static_cast<int>(gridDim.x) / blocks, mine = static_cast<int>(blockIdx.x) / blocks;
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const Slice slice = Slice::of(a.vocab, blocks, rank);
  Logits* kept = reinterpret_cast<Logits*>(memory);
  T* dz = static_cast<T*>(a.dz);
  const int left = *a.count - a.first, counted = left < a.n ? left : a.n;  // of these rows

  // Sums of the job: only the first warp of the cluster touches them.
  const int num_sums = static_cast<int>(job.num_sums);
  const bool reports = rank == 0 && warp == 0, shared_sums = num_sums <= kSharedSums;
  const auto sums = [&] {  // computed where it is needed: registers are scarce
    return shared_sums ? reinterpret_cast<double*>(kept + Slice::largest(a.vocab, blocks))
                       : job.sums + static_cast<int64_t>(mine) * num_sums;
  };
  if (reports && shared_sums) {
    for (int i = lane; i < num_sums; i += kWarp) sums()[i] = 0;
    __syncwarp();
  }

  if (mine < counted) {
    const float* z = a.z + mine * a.z_stride;
    for (int i = thread; i < slice.packs; i += kThreads) fetch(kept + i, z, slice.first + i, a.vocab);
  }
  cluster.sync();  // every block has started: its shared memory can be written to
  int turn = 0, row = mine;
  for (; row < counted; row += clusters) {
    const float* z = a.z + row * a.z_stride;
    const int64_t token = a.rows[a.first + row];
    const int target = static_cast<int>(a.targets[token]);
    const auto inputs = job.token(token);
    // volatile: stays before the barrier, after which the gradient may lie here.
    const float y_target = a.cap(*static_cast<const volatile float*>(z + target));

    wait_for_own_copies();
    const RowPart part =
        joined_warp<Job::kWanted>(logit_row::read_packs<Job::kWanted>(kept, slice, thread, a.vocab, target, a.cap));
    if (lane < blocks) *cluster.map_shared_rank(&inbox[turn][rank * kWarps + warp], lane) = part;
    __syncwarp();
    cluster.sync();
    RowPart whole;
    for (int i = lane; i < blocks * kWarps; i += kWarp) {
      whole = logit_row::joined<Job::kWanted>(whole, inbox[turn][i]);
    }
    whole = joined_warp<Job::kWanted>(whole);
    turn ^= 1;

    const int next = row + clusters;
    const RowGradient of_row = dz == nullptr ? RowGradient{} : job.gradient(whole, inputs, y_target, a.vocab);
    for (int i = thread; i < slice.packs; i += kThreads) {
      const int pack = slice.first + i;
      if (dz != nullptr) {
        const Logits d = logit_row::gradient<Job::kWanted>(kept[i], pack, target, of_row, a.cap);
        store(dz + row * a.dz_stride + pack * kPack, d, size_of(pack, a.vocab));
      }
      if (next < counted) fetch(kept + i, a.z + next * a.z_stride, pack, a.vocab);
    }
    if (reports && lane == 0) job.report(sums(), token, whole, inputs, y_target, a.vocab);
  }
  if (reports && shared_sums) {
    __syncwarp();
    for (int i = lane; i < num_sums; i += kWarp) job.sums[mine * num_sums + i] += sums()[i];
  }
  // Rows behind the last that counts: the matmuls of the gradient go over them.
  if (dz != nullptr) {
    for (; row < a.n; row += clusters) {
      for (int i = thread; i < slice.packs; i += kThreads) {
        const int pack = slice.first + i;
        store(dz + row * a.dz_stride + pack * kPack, Logits{}, size_of(pack, a.vocab));
      }
    }
  }
  __syncwarp();
  cluster.sync();  // no block leaves while another may still write into its inbox
}

#else

template <class T, class Job>
__global__ void __launch_bounds__(kThreads, 2) rows_kernel(const Job, const LogitRows) {}  // the ops refuse such a GPU

#endif

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, which, device);
  FORGE_CHECK(error == cudaSuccess, "rows of logits", cudaGetErrorString(error), "an attribute of the device");
  return value;
}

template <class T, class Job>
void launch(const Job& job, const LogitRows& rows, int64_t cluster, int64_t clusters, int device, cudaStream_t stream) {
  const int64_t sums = job.num_sums <= kSharedSums ? job.num_sums * static_cast<int64_t>(sizeof(double)) : 0;
  const int64_t row = static_cast<int64_t>(Slice::largest(rows.vocab, static_cast<int>(cluster))) * sizeof(Logits);
  const int64_t most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) -
                       static_cast<int64_t>(sizeof(RowPart) * 2 * kMaxCluster * kWarps) - 1024;
  FORGE_CHECK(row + sums <= most, "vocab", rows.vocab << " logits in " << cluster << " blocks, " << row + sums << " bytes",
              "at most " << most << " bytes of shared memory a block");
  const auto kernel = rows_kernel<T, Job>;
  const auto bytes = static_cast<unsigned>(row + sums);
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  FORGE_CHECK(error == cudaSuccess, "rows of logits", cudaGetErrorString(error), "room in shared memory");
  cudaLaunchAttribute dimension{};
  dimension.id = cudaLaunchAttributeClusterDimension;
  dimension.val.clusterDim.x = static_cast<unsigned>(cluster);
  dimension.val.clusterDim.y = dimension.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(cluster * clusters));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &dimension;
  config.numAttrs = 1;
  error = cudaLaunchKernelEx(&config, kernel, job, rows);
  FORGE_CHECK(error == cudaSuccess, "rows of logits", cudaGetErrorString(error), "a kernel launch without error");
}

template <class Job>
void run_rows(const Job& job, const LogitRows& rows, const Tensor& logits, const std::optional<Tensor>& dlogits,
              int64_t cluster, int64_t clusters) {
  const int device = logits.get_device_index();
  const DeviceGuard guard(device);
  FORGE_CHECK(attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9, "logits", "a GPU without thread-block clusters",
              "compute capability 9.0 or later");
  FORGE_CHECK(clusters >= 1, "clusters", clusters, "at least 1");
  if (rows.n == 0) return;
  const cudaStream_t stream = current_stream(logits);
  if (dlogits && dlogits->scalar_type() == ScalarType::BFloat16) {
    launch<__nv_bfloat16>(job, rows, cluster, clusters, device, stream);
  } else {
    launch<float>(job, rows, cluster, clusters, device, stream);
  }
}

}  // namespace
}  // namespace forge
