// The loops of swiglu, for the ops that are made of it.
#pragma once

#include "cpu/vec.h"

namespace forge {

template <class T>
struct SwigluKernels {
  // Elements [begin, end); `gelu` selects gelu_tanh.
  void (*forward)(const T* gate, const T* up, T* y, int64_t begin, int64_t end, bool gelu);
  void (*backward)(const T* dy, const T* gate, const T* up, T* dgate, T* dup, int64_t begin, int64_t end, bool gelu);
};

}  // namespace forge
