// swiglu: y = act(gate) * up with act(x) = x * sigmoid(z(x)), float32 arithmetic.
//   silu:      z(x) = x
//   gelu_tanh: z(x) = 2 * sqrt(2/pi) * (x + 0.044715 x^3), because (1 + tanh(u)) / 2 = sigmoid(2 u)
// act'(x) = s + x * s * (1 - s) * z'(x) with s = sigmoid(z(x)) = 1 / (1 + e), e = exp(-z), and 1 - s = e * s, which loses
// no digits where s is close to one.
#include "cpu/swiglu.h"

namespace forge {
namespace FORGE_ISA {
namespace {

constexpr float kLinear = 1.5957691216057308f;  // 2 * sqrt(2 / pi)
constexpr float kCubic = 0.044715f;

constexpr float kLargest = 3.4028234663852886e38f;

template <bool kGelu>
inline float exp_of_minus_z(float x) {
  return exp_approx(kGelu ? -kLinear * (x + kCubic * x * x * x) : -x);
}

template <class T, bool kGelu>
void forward_range(const T* gate, const T* up, T* y, int64_t begin, int64_t end) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const float g = to_float(gate[i]);
    y[i] = from_float<T>(g / (1.0f + exp_of_minus_z<kGelu>(g)) * to_float(up[i]));
  }
}

template <class T, bool kGelu>
void backward_range(const T* dy, const T* gate, const T* up, T* dgate, T* dup, int64_t begin, int64_t end) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const float g = to_float(gate[i]), dyi = to_float(dy[i]);
    const float e = exp_of_minus_z<kGelu>(g);
    const float s = 1.0f / (1.0f + e);
    const float complement = (e < kLargest ? e : kLargest) * s;  // 0 instead of inf * 0 where e overflows
    const float dz = kGelu ? kLinear * (1.0f + 3.0f * kCubic * g * g) : 1.0f;
    dgate[i] = from_float<T>(dyi * to_float(up[i]) * (s + g * s * complement * dz));
    dup[i] = from_float<T>(dyi * g * s);
  }
}

template <class T>
void forward(const T* gate, const T* up, T* y, int64_t begin, int64_t end, bool gelu) {
  if (gelu) {
    forward_range<T, true>(gate, up, y, begin, end);
  } else {
    forward_range<T, false>(gate, up, y, begin, end);
  }
}

template <class T>
void backward(const T* dy, const T* gate, const T* up, T* dgate, T* dup, int64_t begin, int64_t end, bool gelu) {
  if (gelu) {
    backward_range<T, true>(dy, gate, up, dgate, dup, begin, end);
  } else {
    backward_range<T, false>(dy, gate, up, dgate, dup, begin, end);
  }
}

const RegisterKernels<SwigluKernels<float>> register_float({&forward<float>, &backward<float>});
const RegisterKernels<SwigluKernels<bf16>> register_bf16({&forward<bf16>, &backward<bf16>});

}  // namespace
}  // namespace FORGE_ISA
}  // namespace forge

#if FORGE_ISA_LEVEL == 0

#include <string>

#include "cpu/tensor.h"

namespace forge {
namespace {

constexpr int64_t kGrain = 16384;

void check_alike(const Tensor& a, const Tensor& gate, const char* name) {
  FORGE_CHECK(a.numel() == gate.numel() && a.scalar_type() == gate.scalar_type(), name,
              a.numel() << " elements of " << toString(a.scalar_type()),
              gate.numel() << " of " << toString(gate.scalar_type()) << ", as gate");
}

Tensor swiglu(const Tensor& gate_any, const Tensor& up_any, const std::string& activation) {
  check_alike(up_any, gate_any, "up");
  const Tensor gate = as_contiguous(gate_any), up = as_contiguous(up_any);
  const bool gelu = is_gelu(activation);
  Tensor y = new_tensor_like(gate);
  dispatch_float_bf16(gate, "gate", [&]<class T>() {
    torch::stable::parallel_for(0, gate.numel(), kGrain, [&](int64_t begin, int64_t end) {
      kernels<SwigluKernels<T>>().forward(data<T>(gate), data<T>(up), mutable_data<T>(y), begin, end, gelu);
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& dy_any, const Tensor& gate_any, const Tensor& up_any,
                                           const std::string& activation) {
  check_alike(up_any, gate_any, "up");
  check_alike(dy_any, gate_any, "dy");
  const Tensor dy = as_contiguous(dy_any), gate = as_contiguous(gate_any), up = as_contiguous(up_any);
  const bool gelu = is_gelu(activation);
  Tensor dgate = new_tensor_like(gate), dup = new_tensor_like(gate);
  dispatch_float_bf16(gate, "gate", [&]<class T>() {
    torch::stable::parallel_for(0, gate.numel(), kGrain, [&](int64_t begin, int64_t end) {
      kernels<SwigluKernels<T>>().backward(data<T>(dy), data<T>(gate), data<T>(up), mutable_data<T>(dgate),
                                           mutable_data<T>(dup), begin, end, gelu);
    });
  });
  return {dgate, dup};
}

STABLE_TORCH_LIBRARY_IMPL(forge, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}

}  // namespace
}  // namespace forge

#endif
