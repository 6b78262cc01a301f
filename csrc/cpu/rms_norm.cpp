// rms_norm: y = x * rstd * (weight + offset), rstd = 1 / sqrt(mean(x^2) + eps), one row at a time, float32 arithmetic.
#include "cpu/rms_norm.h"

namespace forge {
namespace FORGE_ISA {
namespace {

// Elements that are summed in float32; the sums of blocks are added in float64. One long float32 sum would round every
// term to the size of the total.
constexpr int64_t kBlock = 1024;

inline int64_t block_end(int64_t from, int64_t d) { return from + kBlock < d ? from + kBlock : d; }

template <class T>
void forward(const T* x, const T* weight, T* y, float* rstd, int64_t begin, int64_t end, int64_t d, float eps,
             float offset) {
  for (int64_t row = begin; row < end; ++row) {
    const T* xr = x + row * d;
    T* yr = y + row * d;
    double sum = 0;
    for (int64_t from = 0; from < d; from += kBlock) {
      const int64_t to = block_end(from, d);
      float part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t i = from; i < to; ++i) part += to_float(xr[i]) * to_float(xr[i]);
      sum += static_cast<double>(part);
    }
    const float r = 1.0f / __builtin_sqrtf(static_cast<float>(sum) / static_cast<float>(d) + eps);
    rstd[row] = r;
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) yr[i] = from_float<T>(to_float(xr[i]) * r * (to_float(weight[i]) + offset));
  }
}

// With g = dy * (weight + offset): dx = rstd * g - x * rstd^3 * mean(g * x); dweight = sum over rows of dy * x * rstd.
template <class T>
void backward(const T* dy, const T* x, const T* weight, const float* rstd, T* dx, float* dweight, int64_t begin,
              int64_t end, int64_t d, float offset) {
  if (dweight != nullptr) {
    for (int64_t i = 0; i < d; ++i) dweight[i] = 0;
  }
  for (int64_t row = begin; row < end; ++row) {
    const T* dyr = dy + row * d;
    const T* xr = x + row * d;
    T* dxr = dx + row * d;
    const float r = rstd[row];
    double dot = 0;
    for (int64_t from = 0; from < d; from += kBlock) {
      const int64_t to = block_end(from, d);
      float part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t i = from; i < to; ++i) part += to_float(dyr[i]) * (to_float(weight[i]) + offset) * to_float(xr[i]);
      dot += static_cast<double>(part);
    }
    const float coefficient = r * r * r * static_cast<float>(dot) / static_cast<float>(d);
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) {
      const float g = to_float(dyr[i]) * (to_float(weight[i]) + offset);
      dxr[i] = from_float<T>(r * g - coefficient * to_float(xr[i]));
    }
    if (dweight != nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < d; ++i) dweight[i] += to_float(dyr[i]) * to_float(xr[i]) * r;
    }
  }
}

const RegisterKernels<RmsNormKernels<float>> register_float({&forward<float>, &backward<float>});
const RegisterKernels<RmsNormKernels<bf16>> register_bf16({&forward<bf16>, &backward<bf16>});

}  // namespace
}  // namespace FORGE_ISA
}  // namespace forge

#if FORGE_ISA_LEVEL == 0

#include "cpu/tensor.h"

namespace forge {
namespace {

// Rows per partial sum of dweight: fixed, so that the result does not depend on the number of threads.
constexpr int64_t kRowsPerPartial = 64;

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x_any, const Tensor& weight_any, double eps, double weight_offset) {
  const Tensor x = as_contiguous(x_any), weight = as_contiguous(weight_any);
  const int64_t d = weight.numel(), rows = d == 0 ? 0 : x.numel() / d;
  Tensor y = new_tensor_like(x);
  Tensor rstd = new_tensor({rows}, ScalarType::Float);
  dispatch_float_bf16(x, "x", [&]<class T>() {
    torch::stable::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
      kernels<RmsNormKernels<T>>().forward(data<T>(x), data<T>(weight), mutable_data<T>(y), mutable_data<float>(rstd),
                                           begin, end, d, static_cast<float>(eps), static_cast<float>(weight_offset));
    });
  });
  return {y, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy_any, const Tensor& x_any, const Tensor& weight_any,
                                             const Tensor& rstd, double weight_offset, bool need_dweight) {
  const Tensor dy = as_contiguous(dy_any), x = as_contiguous(x_any), weight = as_contiguous(weight_any);
  const int64_t d = weight.numel(), rows = rstd.numel();
  const int64_t partials = (rows + kRowsPerPartial - 1) / kRowsPerPartial;
  Tensor dx = new_tensor_like(x);
  Tensor dweight_partial = new_tensor({need_dweight ? partials : 0, d}, ScalarType::Float);
  dispatch_float_bf16(x, "x", [&]<class T>() {
    torch::stable::parallel_for(0, partials, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t last = (p + 1) * kRowsPerPartial < rows ? (p + 1) * kRowsPerPartial : rows;
        kernels<RmsNormKernels<T>>().backward(
            data<T>(dy), data<T>(x), data<T>(weight), data<float>(rstd), mutable_data<T>(dx),
            need_dweight ? mutable_data<float>(dweight_partial) + p * d : nullptr, p * kRowsPerPartial, last, d,
            static_cast<float>(weight_offset));
      }
    });
  });
  if (!need_dweight) return {dx, new_tensor({0}, weight.scalar_type())};
  std::array<int64_t, 1> rows_dim{0};
  return {dx, torch::stable::to(torch::stable::sum(dweight_partial, rows_dim), weight.scalar_type())};
}

STABLE_TORCH_LIBRARY_IMPL(forge, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace
}  // namespace forge

#endif
