#include "mixer.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>

namespace forge::data_plane {
namespace {

constexpr std::int64_t kOne = std::int64_t{1} << 52;
__extension__ typedef __int128 Wide;

// SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
class SplitMix64 {
 public:
  explicit SplitMix64(const std::vector<std::uint64_t>& key) {
    for (const std::uint64_t part : key) state_ = next() ^ part;
  }

  std::uint64_t next() {
    state_ += 0x9E3779B97F4A7C15ULL;
    std::uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
    return z ^ (z >> 31);
  }

  // Uniform in [0, bound): multiply-shift with rejection of the biased remainder (Lemire, 2019).
  std::uint64_t below(std::uint64_t bound) {
    const std::uint64_t biased = (0 - bound) % bound;
    for (;;) {
      __extension__ const unsigned __int128 product = static_cast<unsigned __int128>(next()) * bound;
      if (static_cast<std::uint64_t>(product) >= biased) return static_cast<std::uint64_t>(product >> 64);
    }
  }

 private:
  std::uint64_t state_ = 0;
};

}  // namespace

TokenMixer::TokenMixer(const std::vector<double>& shares, std::uint64_t seed)
    : weights_(shares.size()), ties_(shares.size()), drawn_(shares.size(), 0) {
  if (shares.empty()) throw std::invalid_argument("shares: got no source, expected at least one");
  double sum = 0;
  for (std::size_t s = 0; s < shares.size(); ++s) {
    if (!std::isfinite(shares[s]) || shares[s] < 0) {
      throw std::invalid_argument("shares[" + std::to_string(s) + "]: got " + std::to_string(shares[s]) +
                                  ", expected a finite number of at least 0");
    }
    sum += shares[s];
  }
  if (std::abs(sum - 1) > 1e-6) {
    throw std::invalid_argument("shares: sum is " + std::to_string(sum) + ", expected 1; divide by the sum");
  }
  for (std::size_t s = 0; s < shares.size(); ++s) {
    weights_[s] = std::llround(shares[s] / sum * static_cast<double>(kOne));
    if (shares[s] > 0 && weights_[s] == 0) weights_[s] = 1;
  }
  const std::int64_t rounding = kOne - std::accumulate(weights_.begin(), weights_.end(), std::int64_t{0});
  *std::max_element(weights_.begin(), weights_.end()) += rounding;
  SplitMix64 random({seed, shares.size()});
  for (std::uint64_t& tie : ties_) tie = random.next();
}

std::vector<std::int32_t> TokenMixer::draw(const std::vector<Upcoming>& sources, std::int64_t max_draws,
                                           std::int64_t max_tokens) {
  if (sources.size() != weights_.size()) {
    throw std::invalid_argument("lengths: got " + std::to_string(sources.size()) + " sources, expected " +
                                std::to_string(weights_.size()) + " (one per share)");
  }
  for (std::size_t s = 0; s < sources.size(); ++s) {
    for (std::int64_t i = 0; i < sources[s].count; ++i) {
      if (sources[s].lengths[i] < 1) {
        throw std::invalid_argument("lengths[" + std::to_string(s) + "][" + std::to_string(i) + "]: got " +
                                    std::to_string(sources[s].lengths[i]) + " tokens, expected at least 1");
      }
    }
  }
  std::vector<std::int32_t> chosen;
  std::vector<std::int64_t> next(sources.size(), 0);
  std::int64_t tokens = 0;
  while (static_cast<std::int64_t>(chosen.size()) < max_draws && tokens < max_tokens) {
    std::size_t best = sources.size();
    Wide best_finish = 0;
    for (std::size_t s = 0; s < sources.size(); ++s) {
      if (weights_[s] == 0) continue;
      if (Wide{weights_[s]} * total_ < Wide{drawn_[s]} * kOne) continue;  // ahead of its share
      if (next[s] == sources[s].count) return chosen;  // its next length is needed to compare
      const Wide finish = drawn_[s] + sources[s].lengths[next[s]];
      if (best != sources.size()) {
        const Wide left = finish * weights_[best];
        const Wide right = best_finish * weights_[s];
        if (left > right || (left == right && ties_[s] >= ties_[best])) continue;
      }
      best = s;
      best_finish = finish;
    }
    const std::int64_t length = sources[best].lengths[next[best]++];
    drawn_[best] += length;
    total_ += length;
    tokens += length;
    chosen.push_back(static_cast<std::int32_t>(best));
  }
  return chosen;
}

void TokenMixer::restore(const std::vector<std::int64_t>& drawn) {
  if (drawn.size() != weights_.size()) {
    throw std::invalid_argument("state: holds " + std::to_string(drawn.size()) + " sources, expected " +
                                std::to_string(weights_.size()));
  }
  for (std::size_t s = 0; s < drawn.size(); ++s) {
    if (drawn[s] < 0 || (weights_[s] == 0 && drawn[s] > 0)) {
      throw std::invalid_argument("state: drawn[" + std::to_string(s) + "] is " + std::to_string(drawn[s]) +
                                  ", which this mixer cannot have drawn");
    }
  }
  drawn_ = drawn;
  total_ = std::accumulate(drawn.begin(), drawn.end(), std::int64_t{0});
}

std::vector<std::int64_t> random_permutation(std::int64_t count, const std::vector<std::uint64_t>& key) {
  if (count < 0) throw std::invalid_argument("count: got " + std::to_string(count) + ", expected at least 0");
  std::vector<std::int64_t> order(static_cast<std::size_t>(count));
  std::iota(order.begin(), order.end(), std::int64_t{0});
  SplitMix64 random(key);
  for (std::int64_t i = count - 1; i > 0; --i) {
    const auto j = static_cast<std::size_t>(random.below(static_cast<std::uint64_t>(i) + 1));
    std::swap(order[static_cast<std::size_t>(i)], order[j]);
  }
  return order;
}

}  // namespace forge::data_plane
