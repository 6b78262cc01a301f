// What the ops need of torch, through its stable ABI. Included only where FORGE_ISA_LEVEL == 0.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/memory.h"
#include "cpu/vec.h"

namespace forge {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Names differ from torch::stable's, which argument-dependent lookup would also find.
inline Tensor as_contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

inline size_t element_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Bool:
    case ScalarType::Byte:
      return 1;
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    default:
      throw std::invalid_argument(std::string("dtype: got ") + toString(dtype) + ", expected one that CPU ops return");
  }
}

// Contiguous, not initialised.
inline Tensor new_tensor(torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType dtype) {
  size_t bytes = element_size(dtype);
  for (const int64_t size : shape) bytes *= static_cast<size_t>(size);
  std::array<int64_t, 4> strides{};
  if (bytes < kSmallestBlock || shape.size() > strides.size()) return torch::stable::empty(shape, dtype);

  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= shape[i];
  }
  return torch::stable::from_blob(allocate_block(bytes), shape, {strides.data(), shape.size()},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype, &release_block);
}

inline Tensor new_tensor(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return new_tensor(torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
}

inline Tensor new_tensor_like(const Tensor& x) { return new_tensor(x.sizes(), x.scalar_type()); }

inline Tensor new_zeros(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  Tensor result = new_tensor(sizes, dtype);
  return torch::stable::zero_(result);
}

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Calls f.template operator()<T>() with T = float or bf16.
template <class F>
void dispatch_float_bf16(const Tensor& x, const char* argument, const F& f) {
  const ScalarType dtype = x.scalar_type();
  FORGE_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, argument, toString(dtype),
              "float32 or bfloat16 (other dtypes run with backend=\"reference\")");
  active_isa_level();  // complains here about a wrong FORGE_CPU_ISA: inside parallel_for the message would be lost
  if (dtype == ScalarType::Float) {
    f.template operator()<float>();
  } else {
    f.template operator()<bf16>();
  }
}

// out = a @ b through torch, which runs oneDNN or BLAS on its own thread pool.
inline void mm_out(const Tensor& out, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes back the reference that the call returned
}

// out = beta * self + alpha * a @ b, alpha applied in float32 before out is rounded. self may be out, or [n].
inline void addmm_out(const Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b, double beta = 1.0,
                      double alpha = 1.0) {
  // The dispatcher's stable call knows no Scalar arguments; this C function of the same stable surface takes doubles.
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), self.get(), a.get(), b.get(), beta, alpha));
}

// out = beta * out + alpha * a @ b; with beta 0, out may be uninitialised.
inline void addmm_(const Tensor& out, const Tensor& a, const Tensor& b, double beta = 1.0, double alpha = 1.0) {
  addmm_out(out, out, a, b, beta, alpha);
}

inline Tensor transposed(const Tensor& x) { return torch::stable::transpose(x, 0, 1); }

}  // namespace forge
