// The loops of rms_norm, for the ops that are made of it.
#pragma once

#include "cpu/vec.h"

namespace forge {

template <class T>
struct RmsNormKernels {
  // Rows [begin, end) of x [rows, d] -> y [rows, d], rstd [rows].
  void (*forward)(const T* x, const T* weight, T* y, float* rstd, int64_t begin, int64_t end, int64_t d, float eps,
                  float offset);
  // Rows [begin, end): dx, and dweight [d] (float32, overwritten) summed over these rows unless it is null.
  void (*backward)(const T* dy, const T* x, const T* weight, const float* rstd, T* dx, float* dweight, int64_t begin,
                   int64_t end, int64_t d, float offset);
};

}  // namespace forge
