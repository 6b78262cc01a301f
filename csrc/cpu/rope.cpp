// rope: rotates each pair (x[i], x[i + d/2]) of every head by the token's angle i, float32 arithmetic.
#include "cpu/rope.h"

namespace forge {
namespace FORGE_ISA {
namespace {

template <class T>
void rotate(const T* x, const float* cos, const float* sin, T* y, int64_t begin, int64_t end, int64_t heads,
            int64_t half, float sign) {
  for (int64_t token = begin; token < end; ++token) {
    const float* c = cos + token * half;
    const float* s = sin + token * half;
    for (int64_t head = token * heads; head < (token + 1) * heads; ++head) {
      const T* first = x + head * 2 * half;
      const T* second = first + half;
      T* first_out = y + head * 2 * half;
      T* second_out = first_out + half;
#pragma omp simd
      for (int64_t i = 0; i < half; ++i) {
        const float a = to_float(first[i]), b = to_float(second[i]), turn = sign * s[i];
        first_out[i] = from_float<T>(a * c[i] - b * turn);
        second_out[i] = from_float<T>(b * c[i] + a * turn);
      }
    }
  }
}

const RegisterKernels<RopeKernels<float>> register_float({&rotate<float>});
const RegisterKernels<RopeKernels<bf16>> register_bf16({&rotate<bf16>});

}  // namespace
}  // namespace FORGE_ISA
}  // namespace forge

#if FORGE_ISA_LEVEL == 0

#include "cpu/tensor.h"

namespace forge {
namespace {

Tensor rotated(const Tensor& x_any, const char* name, const Tensor& cos, const Tensor& sin, bool inverse) {
  const int64_t tokens = cos.size(0), half = cos.size(1);
  FORGE_CHECK(x_any.dim() == 3 && x_any.size(0) == tokens && x_any.size(2) == 2 * half, name,
              "a tensor of another shape", "[tokens, heads, d] with cos and sin of [tokens, d / 2]");
  const Tensor x = as_contiguous(x_any);
  Tensor y = new_tensor_like(x);
  const int64_t heads = x.size(1);
  dispatch_float_bf16(x, name, [&]<class T>() {
    torch::stable::parallel_for(0, tokens, 16, [&](int64_t begin, int64_t end) {
      kernels<RopeKernels<T>>().rotate(data<T>(x), data<float>(cos), data<float>(sin), mutable_data<T>(y), begin, end,
                                       heads, half, inverse ? -1.0f : 1.0f);
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> rope(const Tensor& q, const Tensor& k, const Tensor& cos_any, const Tensor& sin_any,
                                bool inverse) {
  for (const Tensor& table : {cos_any, sin_any}) {
    FORGE_CHECK(table.dim() == 2 && table.scalar_type() == ScalarType::Float && table.size(0) == cos_any.size(0) &&
                    table.size(1) == cos_any.size(1),
                "cos, sin", "tensors of another shape or dtype", "float32 [tokens, d / 2], both alike");
  }
  const Tensor cos = as_contiguous(cos_any), sin = as_contiguous(sin_any);
  return {rotated(q, "q", cos, sin, inverse), rotated(k, "k", cos, sin, inverse)};
}

STABLE_TORCH_LIBRARY_IMPL(forge, CPU, m) { m.impl("rope", TORCH_BOX(&rope)); }

}  // namespace
}  // namespace forge

#endif
