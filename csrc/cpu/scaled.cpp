// scaled: a gradient times the upstream gradient of its scalar loss, rounded once. torch's product would be the same
// numbers in fresh memory, whose pages cost more than the pass: 20 instead of 3 ms for a head of 65 MB.
#include "cpu/vec.h"

namespace forge {

template <class T>
struct ScaledKernels {
  void (*run)(const T* x, float factor, T* y, int64_t begin, int64_t end);
};

namespace FORGE_ISA {
namespace {

template <class T>
void run(const T* x, float factor, T* y, int64_t begin, int64_t end) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) y[i] = from_float<T>(to_float(x[i]) * factor);
}

const RegisterKernels<ScaledKernels<float>> register_float({&run<float>});
const RegisterKernels<ScaledKernels<bf16>> register_bf16({&run<bf16>});

}  // namespace
}  // namespace FORGE_ISA
}  // namespace forge

#if FORGE_ISA_LEVEL == 0

#include "cpu/tensor.h"

namespace forge {
namespace {

Tensor scaled(const Tensor& x_any, const Tensor& factor) {
  FORGE_CHECK(factor.numel() == 1 && factor.scalar_type() == ScalarType::Float, "factor",
              toString(factor.scalar_type()) << " with " << factor.numel() << " elements", "one float32");
  const Tensor x = as_contiguous(x_any);
  const Tensor y = new_tensor_like(x);
  dispatch_float_bf16(x, "x", [&]<class T>() {
    torch::stable::parallel_for(0, x.numel(), int64_t{1} << 15, [&](int64_t begin, int64_t end) {
      kernels<ScaledKernels<T>>().run(data<T>(x), *data<float>(factor), mutable_data<T>(y), begin, end);
    });
  });
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(forge, CPU, m) { m.impl("scaled", TORCH_BOX(&scaled)); }

}  // namespace
}  // namespace forge

#endif
