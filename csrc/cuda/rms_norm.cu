// rms_norm: y = x * rstd * (weight + offset), rstd = 1 / sqrt(mean(x^2) + eps), float32 arithmetic.
//
// A row belongs to the threads of one warp (four rows a block) or, when it is long, to a whole block. It is read once, in
// 16-byte packs that stay in registers; rows too long for that are read twice. dweight is summed in two stages in a fixed
// order: over the rows of a partial in registers, then over the partials. No atomics: results are bitwise repeatable.
#include "cuda/tensor.h"

namespace forge {
namespace {

constexpr int kWarp = 32;
constexpr int kRowsPerBlock = 4;   // when a row belongs to one warp
constexpr int kMaxThreads = 512;   // leaves 128 registers a thread
constexpr int kMaxPartials = 512;  // of dweight, times the rows that a block works on at a time

// Threads of a block, by the packs that each keeps; shape_of below stays within it.
constexpr int max_threads(int per_thread) { return per_thread == 1 || per_thread == 2 ? 256 : kMaxThreads; }

// Calls f(j, i) for the packs i of the row that this thread owns; j counts them. kPerThread 0: as many as there are.
template <int kPerThread, class F>
__device__ void for_own_packs(int64_t packs, const F& f) {
  if constexpr (kPerThread > 0) {
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      const int64_t i = threadIdx.x + static_cast<int64_t>(j) * blockDim.x;
      if (i < packs) f(j, i);
    }
  } else {
    for (int64_t i = threadIdx.x; i < packs; i += blockDim.x) f(0, i);
  }
}

// Sum over the threads of a row, the same in all of them. `turn` alternates between the two halves of `shared`, so that
// one barrier a call is enough.
__device__ float sum_of_row(float value, float (*shared)[kWarp], int& turn) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  if (blockDim.x == kWarp) return value;
  float* sums = shared[turn];
  turn ^= 1;
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  float total = 0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) total += sums[warp];
  return total;
}

template <class T, int kVector, int kPerThread>
__global__ void __launch_bounds__(max_threads(kPerThread))
    forward_kernel(const T* __restrict__ x, const T* __restrict__ weight, T* __restrict__ y, float* __restrict__ rstd,
                   int64_t rows, int64_t d, float eps, float offset) {
  using P = Pack<T, kVector>;
  __shared__ float shared[2][kWarp];
  int turn = 0;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y, packs = d / kVector;
  if (row >= rows) return;
  const P* xr = reinterpret_cast<const P*>(x + row * d);
  const P* w = reinterpret_cast<const P*>(weight);
  P* yr = reinterpret_cast<P*>(y + row * d);

  P kept[kPerThread > 0 ? kPerThread : 1];
  float sum = 0;
  for_own_packs<kPerThread>(packs, [&](int j, int64_t i) {
    kept[j] = xr[i];
#pragma unroll
    for (int v = 0; v < kVector; ++v) sum += to_float(kept[j].values[v]) * to_float(kept[j].values[v]);
  });
  const float r = 1.0f / sqrtf(sum_of_row(sum, shared, turn) / static_cast<float>(d) + eps);
  if (threadIdx.x == 0) rstd[row] = r;
  for_own_packs<kPerThread>(packs, [&](int j, int64_t i) {
    if constexpr (kPerThread == 0) kept[j] = xr[i];
    const P wi = w[i];
    P out;
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      out.values[v] = from_float<T>(to_float(kept[j].values[v]) * r * (to_float(wi.values[v]) + offset));
    }
    yr[i] = out;
  });
}

// With g = dy * (weight + offset): dx = rstd * g - x * rstd^3 * mean(g * x). Each row's threads own the rows of one
// partial and add their dy * x * rstd to dweight_partial [partials, d], unless that is null.
template <class T, int kVector, int kPerThread>
__global__ void __launch_bounds__(max_threads(kPerThread))
    backward_kernel(const T* __restrict__ dy, const T* __restrict__ x, const T* __restrict__ weight,
                    const float* __restrict__ rstd, T* __restrict__ dx, float* __restrict__ dweight_partial,
                    int64_t rows, int64_t rows_per_partial, int64_t d, float offset) {
  using P = Pack<T, kVector>;
  constexpr int kKept = kPerThread > 0 ? kPerThread : 1;
  __shared__ float shared[2][kWarp];
  int turn = 0;
  const int64_t partial = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y, packs = d / kVector;
  const int64_t first = partial * rows_per_partial;
  if (first >= rows) return;
  const int64_t last = first + rows_per_partial < rows ? first + rows_per_partial : rows;
  const P* w = reinterpret_cast<const P*>(weight);
  float* dweight = dweight_partial == nullptr ? nullptr : dweight_partial + partial * d;

  const float inverse_d = 1.0f / static_cast<float>(d);
  float dw[kKept][kVector] = {};
  constexpr bool kKeepWeight = kPerThread == 1 || kPerThread == 2;  // with four packs the registers would not do
  P ws[kKept];
  if constexpr (kKeepWeight) for_own_packs<kPerThread>(packs, [&](int j, int64_t i) { ws[j] = w[i]; });
  for (int64_t row = first; row < last; ++row) {
    const P* dyr = reinterpret_cast<const P*>(dy + row * d);
    const P* xr = reinterpret_cast<const P*>(x + row * d);
    P* dxr = reinterpret_cast<P*>(dx + row * d);
    const float r = rstd[row];
    P dys[kKept], xs[kKept];
    float dot = 0;
    for_own_packs<kPerThread>(packs, [&](int j, int64_t i) {
      dys[j] = dyr[i];
      xs[j] = xr[i];
      if constexpr (!kKeepWeight) ws[j] = w[i];
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        dot += to_float(dys[j].values[v]) * (to_float(ws[j].values[v]) + offset) * to_float(xs[j].values[v]);
      }
    });
    const float coefficient = r * r * r * sum_of_row(dot, shared, turn) * inverse_d;
    for_own_packs<kPerThread>(packs, [&](int j, int64_t i) {
      if constexpr (kPerThread == 0) {
        dys[j] = dyr[i];
        xs[j] = xr[i];
      }
      if constexpr (!kKeepWeight) ws[j] = w[i];
      P out;
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        const float dyv = to_float(dys[j].values[v]), xv = to_float(xs[j].values[v]);
        out.values[v] = from_float<T>(r * dyv * (to_float(ws[j].values[v]) + offset) - coefficient * xv);
        if constexpr (kPerThread > 0) {
          dw[j][v] += dyv * xv * r;
        } else if (dweight != nullptr) {
          float* target = dweight + i * kVector + v;
          *target = (row == first ? 0.0f : *target) + dyv * xv * r;
        }
      }
      dxr[i] = out;
    });
  }
  if constexpr (kPerThread > 0) {
    if (dweight == nullptr) return;
    for_own_packs<kPerThread>(packs, [&](int j, int64_t i) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) dweight[i * kVector + v] = dw[j][v];
    });
  }
}

// dweight [d] = sum over partials [partials, d]; a block has 32 columns and 32 interleaved slices of the partials.
template <class T>
__global__ void __launch_bounds__(kWarp* kWarp)
    sum_partials_kernel(const float* __restrict__ partials, T* __restrict__ dweight, int64_t count, int64_t d) {
  __shared__ float shared[kWarp][kWarp + 1];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  float sum = 0;
  if (column < d) {
    for (int64_t p = threadIdx.y; p < count; p += kWarp) sum += partials[p * d + column];
  }
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= d) return;
  float total = 0;
  for (int slice = 0; slice < kWarp; ++slice) total += shared[slice][threadIdx.x];
  dweight[column] = from_float<T>(total);
}

// How a row of `packs` packs is divided: threads of a row, packs a thread keeps (0: too many to keep), rows a block.
struct Shape {
  int threads, per_thread, rows_per_block;
};

Shape shape_of(int64_t packs) {
  if (packs <= 2 * kWarp) return {kWarp, packs <= kWarp ? 1 : 2, kRowsPerBlock};
  const int per_thread = packs <= 256 ? 1 : packs <= 512 ? 2 : packs <= 4 * kMaxThreads ? 4 : 0;
  if (per_thread == 0) return {kMaxThreads, 0, 1};
  const int64_t warps = (packs + per_thread * kWarp - 1) / (per_thread * kWarp);
  return {static_cast<int>(warps) * kWarp, per_thread, 1};
}

// Calls f.template operator()<kVector, kPerThread>(shape).
template <class T, class F>
void dispatch_shape(int64_t d, bool aligned, const F& f) {
  constexpr int kVector = 16 / sizeof(T);
  const bool vectors = aligned && d % kVector == 0;
  const Shape shape = shape_of(vectors ? d / kVector : d);
  const auto with = [&]<int kV>() {
    switch (shape.per_thread) {
      case 1: return f.template operator()<kV, 1>(shape);
      case 2: return f.template operator()<kV, 2>(shape);
      case 4: return f.template operator()<kV, 4>(shape);
      default: return f.template operator()<kV, 0>(shape);
    }
  };
  if (vectors) {
    with.template operator()<kVector>();
  } else {
    with.template operator()<1>();
  }
}

bool aligned_to_16(std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return false;
  }
  return true;
}

void check_same(const Tensor& other, const Tensor& x, const char* name) {
  FORGE_CHECK(other.scalar_type() == x.scalar_type() && other.get_device_index() == x.get_device_index(), name,
              toString(other.scalar_type()) << " on cuda:" << other.get_device_index(),
              toString(x.scalar_type()) << " on cuda:" << x.get_device_index() << ", as x");
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x_any, const Tensor& weight_any, double eps, double weight_offset) {
  check_same(weight_any, x_any, "weight");
  const DeviceGuard guard(x_any.get_device_index());
  const Tensor x = as_contiguous(x_any), weight = as_contiguous(weight_any);
  const int64_t d = weight.numel(), rows = d == 0 ? 0 : x.numel() / d;
  Tensor y = torch::stable::empty_like(x);
  Tensor rstd = new_tensor(x, {rows}, ScalarType::Float);
  if (rows == 0) return {y, rstd};
  const cudaStream_t stream = current_stream(x);
  dispatch_float_bf16_half(x, "x", [&]<class T>() {
    const T* xs = data<T>(x);
    const T* w = data<T>(weight);
    T* ys = mutable_data<T>(y);
    dispatch_shape<T>(d, aligned_to_16({xs, w, ys}), [&]<int kVector, int kPerThread>(const Shape& shape) {
      const dim3 block(shape.threads, shape.rows_per_block);
      const auto blocks = static_cast<unsigned>((rows + shape.rows_per_block - 1) / shape.rows_per_block);
      forward_kernel<T, kVector, kPerThread><<<blocks, block, 0, stream>>>(
          xs, w, ys, mutable_data<float>(rstd), rows, d, static_cast<float>(eps), static_cast<float>(weight_offset));
    });
  });
  check_launch("rms_norm");
  return {y, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy_any, const Tensor& x_any, const Tensor& weight_any,
                                             const Tensor& rstd, double weight_offset, bool need_dweight) {
  check_same(weight_any, x_any, "weight");
  check_same(dy_any, x_any, "dy");
  FORGE_CHECK(dy_any.numel() == x_any.numel(), "dy", dy_any.numel() << " elements", x_any.numel() << ", as x");
  const DeviceGuard guard(x_any.get_device_index());
  const Tensor dy = as_contiguous(dy_any), x = as_contiguous(x_any), weight = as_contiguous(weight_any);
  const int64_t d = weight.numel(), rows = d == 0 ? 0 : x.numel() / d;
  FORGE_CHECK(rstd.numel() == rows && rstd.scalar_type() == ScalarType::Float, "rstd", rstd.numel() << " elements",
              rows << " of float32");
  Tensor dx = torch::stable::empty_like(x);
  Tensor dweight = new_tensor(x, {need_dweight ? d : 0}, weight.scalar_type());
  if (d == 0) return {dx, dweight};
  const cudaStream_t stream = current_stream(x);
  dispatch_float_bf16_half(x, "x", [&]<class T>() {
    const T* dys = data<T>(dy);
    const T* xs = data<T>(x);
    const T* w = data<T>(weight);
    T* dxs = mutable_data<T>(dx);
    dispatch_shape<T>(d, aligned_to_16({dys, xs, w, dxs}), [&]<int kVector, int kPerThread>(const Shape& shape) {
      const int64_t most = static_cast<int64_t>(kMaxPartials) * shape.rows_per_block;
      const int64_t rows_per_partial = (rows + most - 1) / most;
      const int64_t partials = rows == 0 ? 0 : (rows + rows_per_partial - 1) / rows_per_partial;
      Tensor sums = new_tensor(x, {need_dweight ? partials : 0, d}, ScalarType::Float);
      if (partials > 0) {
        const dim3 block(shape.threads, shape.rows_per_block);
        const auto blocks = static_cast<unsigned>((partials + shape.rows_per_block - 1) / shape.rows_per_block);
        backward_kernel<T, kVector, kPerThread><<<blocks, block, 0, stream>>>(
            dys, xs, w, data<float>(rstd), dxs, need_dweight ? mutable_data<float>(sums) : nullptr, rows,
            rows_per_partial, d, static_cast<float>(weight_offset));
        check_launch("rms_norm_backward");
      }
      if (need_dweight) {
        sum_partials_kernel<T><<<static_cast<unsigned>((d + kWarp - 1) / kWarp), dim3(kWarp, kWarp), 0, stream>>>(
            data<float>(sums), mutable_data<T>(dweight), partials, d);
        check_launch("rms_norm_backward");
      }
    });
  });
  return {dx, dweight};
}

STABLE_TORCH_LIBRARY_IMPL(forge, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace
}  // namespace forge
