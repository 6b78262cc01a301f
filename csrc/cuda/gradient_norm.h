// gradient_norm: one sum for each chunk of values, then the root of their sum. Include after blocks.cuh or blocks_cpu.h,
// whose run_sums makes it the op of its device.
#pragma once

#include "adamw_call.h"

namespace forge {
namespace {

struct Gradient {
  const void* values;
  int64_t numel;
  FloatType type;
  bool whole;
};

using GradientTable = tensor_table::TensorTable<Gradient, 16384, 1024>;

struct SumsOfSquares {
  GradientTable table;
  double* sums;  // of this table's chunks

  template <class T>
  FORGE_ALWAYS_INLINE double sum(int entry, int block, int thread) const {
    const T* x = static_cast<const T*>(table.entries[entry].values);
    double sum = 0;
    using namespace tensor_table;
    const auto read = [&]<bool kWhole>(int64_t i, int count) { return load<kWhole>(x, i, count); };
    table.for_packs<4>(entry, block, thread, read, [&]<bool>(const Values& g, int64_t, int) {
      for (int k = 0; k < kPack; ++k) sum += static_cast<double>(g.v[k]) * static_cast<double>(g.v[k]);
    });
    return sum;
  }
  FORGE_ALWAYS_INLINE double operator()(int block, int thread) const {
    const int entry = table.entry_of(block);
    const FloatType type = table.entries[entry].type;
    if (type == FloatType::kBFloat16) return sum<tensor_table::BFloat16>(entry, block, thread);
    if (type == FloatType::kHalf) return sum<tensor_table::Half>(entry, block, thread);
    return sum<float>(entry, block, thread);
  }
  FORGE_ALWAYS_INLINE void finish(int block, double sum) const { sums[block] = sum; }
};

struct RootOfSum {
  const double* sums;
  int64_t count;
  float* norm;

  FORGE_ALWAYS_INLINE double operator()(int, int thread) const {
    double sum = 0;
    FORGE_UNROLL_BY(8)
    for (int64_t i = thread; i < count; i += tensor_table::kThreads) sum += sums[i];
    return sum;
  }
  FORGE_ALWAYS_INLINE void finish(int, double sum) const { *norm = static_cast<float>(sqrt(sum)); }
};

Tensor gradient_norm(const std::vector<Tensor>& gradients_any) {
  std::vector<Tensor> gradients;
  std::vector<Gradient> entries;
  int64_t chunks = 0;
  for (const Tensor& gradient : gradients_any) {
    gradients.push_back(as_contiguous(gradient));
    const void* values = gradients.back().const_data_ptr();
    const int64_t numel = gradient.numel();
    entries.push_back({values, numel, float_type(gradient, "gradients"), tensor_table::aligned(values)});
    chunks += (numel + GradientTable::kChunk - 1) / GradientTable::kChunk;
  }
  FORGE_CHECK(!gradients.empty(), "gradients", "none", "at least one");
  const Tensor& like = gradients[0];
  const DeviceGuard guard(like.get_device_index());
  const Tensor sums = new_tensor(like, {chunks}, ScalarType::Double);
  const Tensor norm = new_tensor(like, {}, ScalarType::Float);
  double* next = mutable_data<double>(sums);
  tensor_table::for_each_table<GradientTable>(entries, [&](const GradientTable& table, int blocks) {
    run_sums(SumsOfSquares{table, next}, blocks, like, "gradient_norm");
    next += blocks;
  });
  run_sums(RootOfSum{data<double>(sums), chunks, mutable_data<float>(norm)}, 1, like, "gradient_norm");
  return norm;
}

}  // namespace
}  // namespace forge
