// Token-exact blending of data sources, and the reproducible shuffle that orders each source.
#pragma once

#include <cstdint>
#include <vector>

namespace forge::data_plane {

// Chooses the source of each next sample so that at every prefix each source's tokens are within one sequence
// (the longest offered so far) of share * total tokens.
//
// The rule is worst-case-fair weighted fair queueing (Bennett and Zhang, "WF2Q", INFOCOM 1996): of the sources
// that are not ahead of their share, take the one whose next sample would be finished first by an ideal fluid
// mixer, (drawn + next) / share. Taking the largest deficit instead strays up to 1.7 sequences with ten sources.
// All arithmetic is exact in integers, so every machine draws the same order.
class TokenMixer {
 public:
  // Throws std::invalid_argument unless shares are finite, not negative and sum to 1 within 1e-6.
  TokenMixer(const std::vector<double>& shares, std::uint64_t seed);

  // lengths[s]: tokens of the upcoming samples of source s. Draws until `max_draws` samples are drawn, at least
  // `max_tokens` tokens are drawn, or the length of a source is needed that has run out. Returns the source of
  // each draw. Nothing is drawn when a length is not positive (std::invalid_argument).
  struct Upcoming {
    const std::int64_t* lengths;
    std::int64_t count;
  };
  std::vector<std::int32_t> draw(const std::vector<Upcoming>& sources, std::int64_t max_draws,
                                 std::int64_t max_tokens);

  std::size_t sources() const { return weights_.size(); }
  const std::vector<std::int64_t>& drawn() const { return drawn_; }
  std::int64_t total() const { return total_; }
  void restore(const std::vector<std::int64_t>& drawn);

 private:
  std::vector<std::int64_t> weights_;  // share * 2^52, sums to exactly 2^52
  std::vector<std::uint64_t> ties_;    // fixed by the seed: decides between equal finish times
  std::vector<std::int64_t> drawn_;
  std::int64_t total_ = 0;
};

// Permutation of 0 .. count - 1: Fisher-Yates over SplitMix64 seeded from `key`. A function of its arguments alone
// (library generators may change between versions; a resumed run may not).
std::vector<std::int64_t> random_permutation(std::int64_t count, const std::vector<std::uint64_t>& key);

}  // namespace forge::data_plane
