// cross_entropy_rows on the CPU: what cross_entropy_rows.cu does, thread by thread and in its order, for tests of the
// arithmetic that both share. Exchanges between threads are plain loops.
#include <vector>

#include "cpu/tensor.h"

#include "cuda/cross_entropy_rows.h"

namespace forge {
namespace {

using namespace cross_entropy;

// Joins the parts of a warp's lanes as shuffles do it.
RowPart joined_warp(std::vector<RowPart> lanes) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    for (int lane = 0; lane < distance; ++lane) lanes[lane] = joined(lanes[lane], lanes[lane + distance]);
  }
  return lanes[0];
}

template <class T>
void run(const float* z, T* dz, const Tensor& logits, int64_t dz_stride, const Tensor& rows, const Tensor& count,
         const Tensor& targets, const std::optional<Tensor>& weights, const std::optional<Tensor>& sources,
         const Tensor& inverse, const Tensor& sums, int64_t first, int blocks, const Options& options) {
  const int vocab = static_cast<int>(logits.size(1));
  const int64_t n = logits.size(0), clusters = sums.size(0), num_sources = sums.size(1);
  const int64_t counted = std::min(n, *data<int32_t>(count) - first);
  for (int64_t row = 0; row < n; ++row) {
    if (row >= counted) {
      for (int64_t i = 0; dz != nullptr && i < vocab; ++i) dz[row * dz_stride + i] = FORGE_ISA::from_float<T>(0.0f);
      continue;
    }
    const int64_t token = data<int32_t>(rows)[first + row];
    const int target = static_cast<int>(data<int64_t>(targets)[token]);
    const float weight = weights ? data<float>(*weights)[token] : 1.0f;
    const float y_target = capped(z[row * logits.stride(0) + target], options.softcap);

    std::vector<std::vector<Logits>> kept(blocks);
    std::vector<RowPart> inbox;
    for (int rank = 0; rank < blocks; ++rank) {
      const Slice slice = Slice::of(vocab, blocks, rank);
      kept[rank].resize(slice.packs);
      for (int i = 0; i < slice.packs; ++i) {
        for (int v = 0; v < kPack; ++v) {
          const int at = (slice.first + i) * kPack + v;
          kept[rank][i].v[v] = at < vocab ? z[row * logits.stride(0) + at] : 0.0f;
        }
      }
      for (int warp = 0; warp < kWarps; ++warp) {
        std::vector<RowPart> lanes(kWarp);
        for (int lane = 0; lane < kWarp; ++lane) {
          lanes[lane] = read_packs(kept[rank].data(), slice, warp * kWarp + lane, vocab, target, options.softcap);
        }
        inbox.push_back(joined_warp(lanes));
      }
    }
    std::vector<RowPart> lanes(kWarp);
    for (size_t i = 0; i < inbox.size(); ++i) lanes[i % kWarp] = joined(lanes[i % kWarp], inbox[i]);
    const RowPart whole = joined_warp(lanes);

    const float scale = weight * static_cast<float>(*data<double>(inverse));
    const RowGradient of_row = row_gradient(whole, vocab, scale, options);
    for (int rank = 0; dz != nullptr && rank < blocks; ++rank) {
      const Slice slice = Slice::of(vocab, blocks, rank);
      for (int i = 0; i < slice.packs; ++i) {
        const int pack = slice.first + i;
        const Logits d = gradient(kept[rank][i], pack, target, of_row, options.softcap);
        for (int v = 0; v < kPack; ++v) {
          if (pack * kPack + v < vocab) dz[row * dz_stride + pack * kPack + v] = FORGE_ISA::from_float<T>(d.v[v]);
        }
      }
    }
    double* of_cluster = mutable_data<double>(sums) + row % clusters * num_sources * kSums;
    add_row(of_cluster, sources ? data<int32_t>(*sources)[token] : 0, weight, whole, y_target, vocab, options);
  }
}

void cross_entropy_rows(const Tensor& logits, std::optional<Tensor> dlogits, const Tensor& rows, const Tensor& count,
                        const Tensor& targets, std::optional<Tensor> weights, std::optional<Tensor> sources,
                        const Tensor& inverse, const Tensor& sums, int64_t first, int64_t cluster, double softcap,
                        double z_loss, double label_smoothing) {
  check_rows(logits, dlogits, sums, cluster);
  const Options options{static_cast<float>(softcap), static_cast<float>(z_loss), static_cast<float>(label_smoothing)};
  const auto go = [&]<class T>() {
    T* dz = dlogits ? mutable_data<T>(*dlogits) : nullptr;
    run<T>(data<float>(logits), dz, logits, dlogits ? dlogits->stride(0) : 0, rows, count, targets, weights, sources,
           inverse, sums, first, static_cast<int>(cluster), options);
  };
  if (dlogits && dlogits->scalar_type() == ScalarType::BFloat16) {
    go.template operator()<bf16>();
  } else {
    go.template operator()<float>();
  }
}

STABLE_TORCH_LIBRARY_IMPL(forge, CPU, m) { m.impl("cross_entropy_rows", TORCH_BOX(&cross_entropy_rows)); }

}  // namespace
}  // namespace forge
