// Many tensors as one list of values, divided among threads: hundreds of small tensors balance as well as one large.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/tensor.h"

namespace forge {

// Values are taken in blocks that lie within one tensor and do not depend on the number of threads.
class ValueList {
 public:
  static constexpr int64_t kBlock = 4096;

  void add(int64_t numel) { first_.push_back(blocks() + (numel + kBlock - 1) / kBlock); numel_.push_back(numel); }

  int64_t blocks() const { return first_.back(); }

  // Calls f(block, tensor, begin, end) for every block, in threads; values [begin, end) of the tensor are the block's.
  template <class F>
  void for_each_block(const F& f) const {
    torch::stable::parallel_for(0, blocks(), 8, [&](int64_t first, int64_t last) {
      size_t tensor = std::upper_bound(first_.begin(), first_.end(), first) - first_.begin() - 1;
      for (int64_t block = first; block < last; ++block) {
        while (block >= first_[tensor + 1]) ++tensor;
        const int64_t begin = (block - first_[tensor]) * kBlock;
        f(block, tensor, begin, std::min(begin + kBlock, numel_[tensor]));
      }
    });
  }

 private:
  std::vector<int64_t> first_{0};  // block of each tensor, and the number of all
  std::vector<int64_t> numel_;
};

}  // namespace forge
