// What decode_layers.cpp is told about the model: pointers into the tensors of its layers, checked once per call.
// Included where FORGE_ISA_LEVEL == 0.
#pragma once

#include <string>
#include <vector>

#include "cpu/tensor.h"

namespace forge::decoding {

// y = x weight^T + bias + (x lora_a^T) lora_b^T; bias and adapter null where there is none.
struct Linear {
  const bf16 *weight, *bias, *lora_a, *lora_b;
  int64_t outputs, depth, rank;
};

struct Layer {
  const bf16 *pre_attention, *post_attention, *pre_mlp, *post_mlp, *q_norm, *k_norm;  // norms; null where there is none
  bool norm_per_head;                                                                // q_norm and k_norm
  Linear q, k, v, o, gate, up, down;
  bf16 *keys, *values;      // [rows, kv_heads, capacity, d]
  const float *cos, *sin;   // [positions, d / 2]
  int64_t window;           // 0: none
};

struct Model {
  int64_t hidden, q_heads, kv_heads, d, inner, capacity, positions;
  std::vector<Layer> layers;
  float eps, weight_offset, scale, softcap;  // softcap 0: none
  bool gelu;
};

// The order of the slots of one layer: six norms, then weight, bias, lora_a, lora_b of seven linear layers.
constexpr int64_t kNorms = 6, kLinears = 7, kSlots = kNorms + 4 * kLinears;

// Finds the tensors of one layer: slots holds, for each layer and place, an index into tensors, or -1.
class LayerSlots {
 public:
  LayerSlots(const std::vector<Tensor>& tensors, const std::vector<int64_t>& slots, int64_t layer)
      : tensors_(tensors), slots_(slots.data() + layer * kSlots), layer_(layer) {}

  // A vector of one of these sizes, or null. Returns its size through `found`.
  const bf16* vector(int64_t place, const char* name, int64_t size, int64_t other_size = -1,
                     int64_t* found = nullptr) const {
    const Tensor* x = at(place);
    if (x == nullptr) return nullptr;
    FORGE_CHECK(x->dim() == 1 && (x->size(0) == size || x->size(0) == other_size) && x->is_contiguous() &&
                    x->scalar_type() == ScalarType::BFloat16,
                name, "another shape, dtype or layout in layer " << layer_, "contiguous bfloat16 [" << size << "]");
    if (found != nullptr) *found = x->size(0);
    return data<bf16>(*x);
  }

  // outputs -1: any number.
  Linear linear(int64_t index, const char* name, int64_t outputs, int64_t depth) const {
    const int64_t place = kNorms + 4 * index;
    const Tensor *weight = at(place), *a = at(place + 2), *b = at(place + 3);
    FORGE_CHECK(weight != nullptr && (a == nullptr) == (b == nullptr), name, "a missing tensor in layer " << layer_,
                "a weight, and both sides of an adapter or none");
    if (outputs < 0) outputs = weight->dim() == 2 ? weight->size(0) : 0;
    const int64_t rank = a == nullptr ? 0 : a->size(0);
    return {matrix(*weight, name, outputs, depth),
            vector(place + 1, name, outputs),
            a == nullptr ? nullptr : matrix(*a, name, rank, depth),
            b == nullptr ? nullptr : matrix(*b, name, outputs, rank),
            outputs,
            depth,
            rank};
  }

 private:
  const Tensor* at(int64_t place) const {
    const int64_t index = slots_[place];
    FORGE_CHECK(index >= -1 && index < static_cast<int64_t>(tensors_.size()), "slots", index,
                "-1 or the index of one of " << tensors_.size() << " tensors");
    return index < 0 ? nullptr : &tensors_[static_cast<size_t>(index)];
  }

  const bf16* matrix(const Tensor& x, const char* name, int64_t rows, int64_t columns) const {
    FORGE_CHECK(x.dim() == 2 && x.size(0) == rows && x.size(1) == columns && x.is_contiguous() &&
                    x.scalar_type() == ScalarType::BFloat16,
                name, "another shape, dtype or layout in layer " << layer_,
                "contiguous bfloat16 [" << rows << ", " << columns << "]");
    return data<bf16>(x);
  }

  const std::vector<Tensor>& tensors_;
  const int64_t* slots_;
  int64_t layer_;
};

}  // namespace forge::decoding
