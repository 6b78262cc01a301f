// cross_entropy_rows: loss, statistics per source and gradient of rows of logits, each read from memory once.
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
// The arithmetic is in cross_entropy_row.h and is tested on the CPU. No atomics: results repeat bit for bit.


#include <cooperative_groups.h>

#include "cuda/tensor.h"

#include "cuda/cross_entropy_rows.h"

namespace forge {
namespace {

using namespace cross_entropy;

constexpr int kSharedSources = 256;  // whose sums fit beside a row; those of more stay in global memory

struct Rows {
  const float* z;
  void* dz;  // of the kernel's T; may lie over z; null without gradient
  const int32_t* rows;
  const int32_t* count;
  const int64_t* targets;
  const float* weights;    // or null
  const int32_t* sources;  // or null
  const double* inverse;
  double* sums;  // [clusters, sources, kSums]
  int64_t z_stride, dz_stride, num_sources;
  int first, n, vocab;
  Options options;
};

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
__device__ RowPart joined_warp(RowPart part) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    part = joined(part, from_lane(part, (lane + distance) % kWarp));
  }
  return from_lane(part, 0);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) rows_kernel(const Rows a) {
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
  const float inverse = static_cast<float>(*a.inverse);

  // Sums of the sources: only the first warp of the cluster touches them.
  const bool reports = rank == 0 && warp == 0, shared_sums = a.num_sources <= kSharedSources;
  const auto sums = [&] {  // computed where it is needed: registers are scarce
    return shared_sums ? reinterpret_cast<double*>(kept + Slice::largest(a.vocab, blocks))
                       : a.sums + mine * a.num_sources * kSums;
  };
  if (reports && shared_sums) {
    for (int i = lane; i < static_cast<int>(a.num_sources) * kSums; i += kWarp) sums()[i] = 0;
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
    const float weight = a.weights == nullptr ? 1.0f : a.weights[token];
    // volatile: stays before the barrier, after which the gradient may lie here.
    const float y_target = capped(*static_cast<const volatile float*>(z + target), a.options.softcap);

    wait_for_own_copies();
    const RowPart part = joined_warp(read_packs(kept, slice, thread, a.vocab, target, a.options.softcap));
    if (lane < blocks) *cluster.map_shared_rank(&inbox[turn][rank * kWarps + warp], lane) = part;
    __syncwarp();
    cluster.sync();
    RowPart whole;
    for (int i = lane; i < blocks * kWarps; i += kWarp) whole = joined(whole, inbox[turn][i]);
    whole = joined_warp(whole);
    turn ^= 1;

    const int next = row + clusters;
    const RowGradient of_row = row_gradient(whole, a.vocab, weight * inverse, a.options);
    for (int i = thread; i < slice.packs; i += kThreads) {
      const int pack = slice.first + i;
      if (dz != nullptr) {
        const Logits d = gradient(kept[i], pack, target, of_row, a.options.softcap);
        store(dz + row * a.dz_stride + pack * kPack, d, size_of(pack, a.vocab));
      }
      if (next < counted) fetch(kept + i, a.z + next * a.z_stride, pack, a.vocab);
    }
    if (reports && lane == 0) {
      add_row(sums(), a.sources == nullptr ? 0 : a.sources[token], weight, whole, y_target, a.vocab, a.options);
    }
  }
  if (reports && shared_sums) {
    __syncwarp();
    const int values = static_cast<int>(a.num_sources) * kSums;
    for (int i = lane; i < values; i += kWarp) a.sums[mine * values + i] += sums()[i];
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

template <class T>
__global__ void __launch_bounds__(kThreads, 2) rows_kernel(const Rows) {}  // no clusters: the op refuses such a GPU

#endif

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, which, device);
  FORGE_CHECK(error == cudaSuccess, "cross_entropy_rows", cudaGetErrorString(error), "an attribute of the device");
  return value;
}

template <class T>
void launch(const Rows& rows, int64_t cluster, int64_t clusters, int device, cudaStream_t stream) {
  const int64_t sums = rows.num_sources <= kSharedSources ? rows.num_sources * kSums * sizeof(double) : 0;
  const int64_t row = static_cast<int64_t>(Slice::largest(rows.vocab, static_cast<int>(cluster))) * sizeof(Logits);
  const int64_t most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) -
                       static_cast<int64_t>(sizeof(RowPart) * 2 * kMaxCluster * kWarps) - 1024;
  FORGE_CHECK(row + sums <= most, "vocab", rows.vocab << " logits in " << cluster << " blocks, " << row + sums << " bytes",
              "at most " << most << " bytes of shared memory a block");
  const auto bytes = static_cast<unsigned>(row + sums);
  cudaError_t error =
      cudaFuncSetAttribute(rows_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  FORGE_CHECK(error == cudaSuccess, "cross_entropy_rows", cudaGetErrorString(error), "room in shared memory");
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
  error = cudaLaunchKernelEx(&config, rows_kernel<T>, rows);
  FORGE_CHECK(error == cudaSuccess, "cross_entropy_rows", cudaGetErrorString(error), "a kernel launch without error");
}

void cross_entropy_rows(const Tensor& logits, std::optional<Tensor> dlogits, const Tensor& rows, const Tensor& count,
                        const Tensor& targets, std::optional<Tensor> weights, std::optional<Tensor> sources,
                        const Tensor& inverse, const Tensor& sums, int64_t first, int64_t cluster, double softcap,
                        double z_loss, double label_smoothing) {
  check_rows(logits, dlogits, sums, cluster);
  const DeviceGuard guard(logits.get_device_index());
  const int device = logits.get_device_index();
  FORGE_CHECK(attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9, "logits", "a GPU without thread-block clusters",
              "compute capability 9.0 or later");
  const Rows arguments{data<float>(logits), dlogits ? dlogits->mutable_data_ptr() : nullptr, data<int32_t>(rows),
                       data<int32_t>(count), data<int64_t>(targets), weights ? data<float>(*weights) : nullptr,
                       sources ? data<int32_t>(*sources) : nullptr, data<double>(inverse), mutable_data<double>(sums),
                       logits.stride(0), dlogits ? dlogits->stride(0) : 0, sums.size(1), static_cast<int>(first),
                       static_cast<int>(logits.size(0)), static_cast<int>(logits.size(1)),
                       {static_cast<float>(softcap), static_cast<float>(z_loss), static_cast<float>(label_smoothing)}};
  if (logits.size(0) == 0) return;
  const cudaStream_t stream = current_stream(logits);
  if (dlogits && dlogits->scalar_type() == ScalarType::BFloat16) {
    launch<__nv_bfloat16>(arguments, cluster, sums.size(0), device, stream);
  } else {
    launch<float>(arguments, cluster, sums.size(0), device, stream);
  }
}

STABLE_TORCH_LIBRARY_IMPL(forge, CUDA, m) { m.impl("cross_entropy_rows", TORCH_BOX(&cross_entropy_rows)); }

}  // namespace
}  // namespace forge
