// run_rows on the CPU: what logit_rows.cuh does, thread by thread and in its order, for tests of the arithmetic that both
// share. Exchanges between threads are plain loops.
#pragma once

#include <vector>

#include "cpu/tensor.h"

#include "cuda/logit_rows.h"

namespace forge {
namespace {

// Joins the parts of a warp's lanes as shuffles do it.
template <logit_row::Wanted kWanted>
logit_row::RowPart joined_warp(std::vector<logit_row::RowPart> lanes) {
  for (int distance = logit_row::kWarp / 2; distance > 0; distance /= 2) {
    for (int lane = 0; lane < distance; ++lane) {
      lanes[lane] = logit_row::joined<kWanted>(lanes[lane], lanes[lane + distance]);
    }
  }
  return lanes[0];
}

template <class T, class Job>
void run_rows_as(const Job& job, const LogitRows& a, int blocks, int64_t clusters) {
  using namespace logit_row;
  T* dz = static_cast<T*>(a.dz);
  const int64_t counted = std::min<int64_t>(a.n, *a.count - a.first);
  for (int64_t row = 0; row < a.n; ++row) {
    if (row >= counted) {
      for (int64_t i = 0; dz != nullptr && i < a.vocab; ++i) dz[row * a.dz_stride + i] = FORGE_ISA::from_float<T>(0.0f);
      continue;
    }
    const float* z = a.z + row * a.z_stride;
    const int64_t token = a.rows[a.first + row];
    const int target = static_cast<int>(a.targets[token]);
    const auto inputs = job.token(token);
    const float y_target = a.cap(z[target]);

    std::vector<std::vector<Logits>> kept(blocks);
    std::vector<RowPart> inbox;
    for (int rank = 0; rank < blocks; ++rank) {
      const Slice slice = Slice::of(a.vocab, blocks, rank);
      kept[rank].resize(slice.packs);
      for (int i = 0; i < slice.packs; ++i) {
        for (int v = 0; v < kPack; ++v) {
          const int at = (slice.first + i) * kPack + v;
          kept[rank][i].v[v] = at < a.vocab ? z[at] : 0.0f;
        }
      }
      for (int warp = 0; warp < kWarps; ++warp) {
        std::vector<RowPart> lanes(kWarp);
        for (int lane = 0; lane < kWarp; ++lane) {
          lanes[lane] =
              read_packs<Job::kWanted>(kept[rank].data(), slice, warp * kWarp + lane, a.vocab, target, a.cap);
        }
        inbox.push_back(joined_warp<Job::kWanted>(lanes));
      }
    }
    std::vector<RowPart> lanes(kWarp);
    for (size_t i = 0; i < inbox.size(); ++i) lanes[i % kWarp] = joined<Job::kWanted>(lanes[i % kWarp], inbox[i]);
    const RowPart whole = joined_warp<Job::kWanted>(lanes);

    if (dz != nullptr) {
      const RowGradient of_row = job.gradient(whole, inputs, y_target, a.vocab);
      for (int rank = 0; rank < blocks; ++rank) {
        const Slice slice = Slice::of(a.vocab, blocks, rank);
        for (int i = 0; i < slice.packs; ++i) {
          const int pack = slice.first + i;
          const Logits d = gradient<Job::kWanted>(kept[rank][i], pack, target, of_row, a.cap);
          for (int v = 0; v < kPack; ++v) {
            if (pack * kPack + v < a.vocab) dz[row * a.dz_stride + pack * kPack + v] = FORGE_ISA::from_float<T>(d.v[v]);
          }
        }
      }
    }
    double* sums = job.num_sums == 0 ? nullptr : job.sums + row % clusters * job.num_sums;
    job.report(sums, token, whole, inputs, y_target, a.vocab);
  }
}

template <class Job>
void run_rows(const Job& job, const LogitRows& rows, const Tensor&, const std::optional<Tensor>& dlogits,
              int64_t cluster, int64_t clusters) {
  if (dlogits && dlogits->scalar_type() == ScalarType::BFloat16) {
    run_rows_as<bf16>(job, rows, static_cast<int>(cluster), clusters);
  } else {
    run_rows_as<float>(job, rows, static_cast<int>(cluster), clusters);
  }
}

}  // namespace
}  // namespace forge
