// The loop of rope, for the ops that are made of it.
#pragma once

#include "cpu/vec.h"

namespace forge {

template <class T>
struct RopeKernels {
  // Tokens [begin, end) of x [tokens, heads, 2 * half] -> y, by cos and sin [tokens, half]; sign -1 turns back.
  void (*rotate)(const T* x, const float* cos, const float* sin, T* y, int64_t begin, int64_t end, int64_t heads,
                 int64_t half, float sign);
};

}  // namespace forge
