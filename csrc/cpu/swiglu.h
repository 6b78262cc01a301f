// The loops of swiglu, for the ops that are made of it.
#pragma once

#include "cpu/vec.h"

#if FORGE_ISA_LEVEL == 0
#include <string>

#include "check.h"
#endif

namespace forge {

template <class T>
struct SwigluKernels {
  // Elements [begin, end); `gelu` selects gelu_tanh.
  void (*forward)(const T* gate, const T* up, T* y, int64_t begin, int64_t end, bool gelu);
  void (*backward)(const T* dy, const T* gate, const T* up, T* dgate, T* dup, int64_t begin, int64_t end, bool gelu);
};

#if FORGE_ISA_LEVEL == 0
inline bool is_gelu(const std::string& activation) {
  FORGE_CHECK(activation == "silu" || activation == "gelu_tanh", "activation", activation, "silu or gelu_tanh");
  return activation == "gelu_tanh";
}
#endif

}  // namespace forge
