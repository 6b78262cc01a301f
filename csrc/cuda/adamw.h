// adamw_: a launch of a thread per tensor for what is the same for all of its values, and one of a block per chunk of
// values for the update. Include after blocks.cuh or blocks_cpu.h, whose run_blocks makes it the op of its device.
#pragma once

#include "adamw_call.h"

namespace forge {
namespace {

struct AdamWEntry : AdamWTensor {
  bool whole;
};

using AdamWTable = tensor_table::TensorTable<AdamWEntry, 8192, 448>;

// Counts the step of every tensor of the table and leaves its factors to the update. A launch of its own: no block may
// count the step that another one is about to read.
struct AdamWSteps {
  AdamWTable table;
  AdamWOptions options;
  float* steps;
  AdamWFactors* factors;

  FORGE_ALWAYS_INLINE void operator()(int block, int thread) const {
    const int entry = block * tensor_table::kThreads + thread;
    if (entry >= table.size) return;
    const int32_t tensor = table.entries[entry].index;
    factors[tensor] = options.factors(tensor, steps[tensor] += 1.0f);
  }
};

struct AdamWUpdate {
  AdamWTable table;
  const AdamWFactors* factors;

  FORGE_ALWAYS_INLINE void operator()(int block, int thread) const {
    const int entry = table.entry_of(block);
    const AdamWEntry& t = table.entries[entry];
    const AdamWFactors f = factors[t.index];
    using namespace tensor_table;
    struct Loaded {
      Values g, p, m, v;
    };
    const auto read = [&]<bool kWhole>(int64_t i, int count) -> Loaded {
      return {load<kWhole>(t.gradient, t.gradient_type, i, count), load<kWhole>(t.parameter, i, count),
              load<kWhole>(t.exp_avg, i, count), load<kWhole>(t.exp_avg_sq, i, count)};
    };
    table.for_packs<1>(entry, block, thread, read, [&]<bool kWhole>(Loaded x, int64_t i, int count) {
      for (int k = 0; k < kPack; ++k) adamw_value(f, x.g.v[k], x.p.v[k], x.m.v[k], x.v.v[k]);
      store<kWhole>(t.parameter, i, count, x.p);
      store<kWhole>(t.exp_avg, i, count, x.m);
      store<kWhole>(t.exp_avg_sq, i, count, x.v);
      if (t.rounded == nullptr) return;
      if (t.rounded_type == FloatType::kHalf) {
        store<kWhole>(static_cast<Half*>(t.rounded), i, count, x.p);
      } else {
        store<kWhole>(static_cast<BFloat16*>(t.rounded), i, count, x.p);
      }
    });
  }
};

void update(const AdamWCall& call) {
  std::vector<AdamWEntry> entries;
  for (const AdamWTensor& t : call.tensors) {
    using tensor_table::aligned;
    const bool whole = aligned(t.parameter) && aligned(t.exp_avg) && aligned(t.exp_avg_sq) && aligned(t.gradient) &&
                       aligned(t.rounded);
    entries.push_back({t, whole});
  }
  const Tensor& steps = call.steps;
  const DeviceGuard guard(steps.get_device_index());
  const int64_t floats = sizeof(AdamWFactors) / sizeof(float);
  const Tensor scratch = new_tensor(steps, {steps.numel(), floats}, ScalarType::Float);
  AdamWFactors* factors = reinterpret_cast<AdamWFactors*>(mutable_data<float>(scratch));
  tensor_table::for_each_table<AdamWTable>(entries, [&](const AdamWTable& table, int blocks) {
    const int tensor_blocks = (table.size + tensor_table::kThreads - 1) / tensor_table::kThreads;
    run_blocks(AdamWSteps{table, call.options, mutable_data<float>(steps), factors}, tensor_blocks, steps, "adamw_");
    run_blocks(AdamWUpdate{table, factors}, blocks, steps, "adamw_");
  });
}

}  // namespace
}  // namespace forge
