#include "packer.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace forge::data_plane {
namespace {

constexpr std::int32_t kNone = -1;

// Set of integers in [0, size) as a tree of 64-bit words: each bit of a level says whether the word below is
// non-zero. Insert, erase and "smallest member >= x" take one step per level (three up to 262,144 values).
class IntegerSet {
 public:
  explicit IntegerSet(std::int64_t size) {
    do {
      size = (size + 63) / 64;
      levels_.emplace_back(static_cast<std::size_t>(size), 0);
    } while (size > 1);
  }

  void insert(std::int64_t value) {
    for (auto& level : levels_) {
      std::uint64_t& word = level[static_cast<std::size_t>(value >> 6)];
      const bool was_empty = word == 0;
      word |= std::uint64_t{1} << (value & 63);
      if (!was_empty) return;
      value >>= 6;
    }
  }

  void erase(std::int64_t value) {
    for (auto& level : levels_) {
      std::uint64_t& word = level[static_cast<std::size_t>(value >> 6)];
      word &= ~(std::uint64_t{1} << (value & 63));
      if (word != 0) return;
      value >>= 6;
    }
  }

  // Smallest member >= value, or -1.
  std::int64_t at_least(std::int64_t value) const {
    std::size_t depth = 0;
    for (; depth < levels_.size(); ++depth) {
      const auto& level = levels_[depth];
      const auto index = static_cast<std::size_t>(value >> 6);
      if (index >= level.size()) return -1;
      const std::uint64_t rest = level[index] >> (value & 63);
      if (rest != 0) {
        value += __builtin_ctzll(rest);
        break;
      }
      value = (value >> 6) + 1;  // next word: search one level up, from there on
    }
    if (depth == levels_.size()) return -1;
    while (depth-- > 0) {
      value = (value << 6) + __builtin_ctzll(levels_[depth][static_cast<std::size_t>(value)]);
    }
    return value;
  }

 private:
  std::vector<std::vector<std::uint64_t>> levels_;
};

// Open packs filed by their remaining room: one stack per room, and the set of rooms that have any.
class OpenPacks {
 public:
  explicit OpenPacks(std::int64_t budget)
      : rooms_(budget + 1), top_(static_cast<std::size_t>(budget) + 1, kNone) {}

  std::int32_t count() const { return static_cast<std::int32_t>(below_.size()); }

  std::int32_t open(std::int64_t room) {
    below_.push_back(kNone);
    const std::int32_t pack = count() - 1;
    file(pack, room);
    return pack;
  }

  // Takes `length` from the fullest pack with that much room; -1 when there is none.
  std::int32_t place(std::int64_t length) {
    const std::int64_t room = rooms_.at_least(length);
    if (room < 0) return kNone;
    const std::int32_t pack = top_[static_cast<std::size_t>(room)];
    top_[static_cast<std::size_t>(room)] = below_[static_cast<std::size_t>(pack)];
    if (top_[static_cast<std::size_t>(room)] == kNone) rooms_.erase(room);
    file(pack, room - length);
    return pack;
  }

 private:
  void file(std::int32_t pack, std::int64_t room) {
    std::int32_t& top = top_[static_cast<std::size_t>(room)];
    if (top == kNone) rooms_.insert(room);
    below_[static_cast<std::size_t>(pack)] = top;
    top = pack;
  }

  IntegerSet rooms_;
  std::vector<std::int32_t> top_;
  std::vector<std::int32_t> below_;
};

void check_lengths(const std::int64_t* lengths, std::int64_t count, std::int64_t budget) {
  if (budget < 1) {
    throw std::invalid_argument("budget: got " + std::to_string(budget) + ", expected at least 1 token");
  }
  if (count > std::numeric_limits<std::int32_t>::max()) {
    throw std::invalid_argument("lengths: got " + std::to_string(count) +
                                " sequences, expected at most 2147483647; pack in several calls");
  }
  for (std::int64_t i = 0; i < count; ++i) {
    if (lengths[i] < 0 || lengths[i] > budget) {
      throw std::invalid_argument("lengths[" + std::to_string(i) + "]: got " + std::to_string(lengths[i]) +
                                  " tokens, expected 0 to budget = " + std::to_string(budget) +
                                  "; shorten or split this sequence, or raise the budget");
    }
  }
}

// Indices by falling length, equal lengths in input order (counting sort).
std::vector<std::int32_t> longest_first(const std::int64_t* lengths, std::int64_t count, std::int64_t budget) {
  std::vector<std::int32_t> sorted(static_cast<std::size_t>(count));
  if (count < budget / 8) {  // few sequences: clearing the counters would cost more than comparing
    for (std::int64_t i = 0; i < count; ++i) sorted[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(i);
    std::stable_sort(sorted.begin(), sorted.end(),
                     [lengths](std::int32_t a, std::int32_t b) { return lengths[a] > lengths[b]; });
    return sorted;
  }
  std::vector<std::int32_t> cursor(static_cast<std::size_t>(budget) + 2, 0);
  for (std::int64_t i = 0; i < count; ++i) ++cursor[static_cast<std::size_t>(budget - lengths[i]) + 1];
  for (std::size_t k = 1; k < cursor.size(); ++k) cursor[k] += cursor[k - 1];
  for (std::int64_t i = 0; i < count; ++i) {
    std::int32_t& at = cursor[static_cast<std::size_t>(budget - lengths[i])];
    sorted[static_cast<std::size_t>(at++)] = static_cast<std::int32_t>(i);
  }
  return sorted;
}

// members[k] went into pack pack_of[k]; packs come out in number order, members in their order within a pack.
Packs collect(const std::vector<std::int32_t>& members, const std::vector<std::int32_t>& pack_of,
              std::int32_t packs) {
  Packs result;
  result.offsets.assign(static_cast<std::size_t>(packs) + 1, 0);
  for (const std::int32_t pack : pack_of) ++result.offsets[static_cast<std::size_t>(pack) + 1];
  for (std::size_t i = 1; i < result.offsets.size(); ++i) result.offsets[i] += result.offsets[i - 1];
  std::vector<std::int64_t> cursor(result.offsets.begin(), result.offsets.end() - 1);
  result.order.resize(members.size());
  for (std::size_t k = 0; k < members.size(); ++k) {
    std::int64_t& at = cursor[static_cast<std::size_t>(pack_of[k])];
    result.order[static_cast<std::size_t>(at++)] = members[k];
  }
  return result;
}

}  // namespace

Packs pack_sequences(const std::int64_t* lengths, std::int64_t count, std::int64_t budget) {
  check_lengths(lengths, count, budget);
  const std::vector<std::int32_t> sorted = longest_first(lengths, count, budget);
  std::vector<std::int32_t> pack_of(sorted.size());
  OpenPacks open(budget);
  for (std::size_t k = 0; k < sorted.size(); ++k) {
    const std::int64_t length = lengths[sorted[k]];
    const std::int32_t pack = open.place(length);
    pack_of[k] = pack != kNone ? pack : open.open(budget - length);
  }
  return collect(sorted, pack_of, open.count());
}

Packs pack_step(const std::int64_t* lengths, std::int64_t count, std::int64_t budget, std::int64_t max_packs) {
  check_lengths(lengths, count, budget);
  if (max_packs < 1) {
    throw std::invalid_argument("max_packs: got " + std::to_string(max_packs) + ", expected at least 1");
  }
  // The prefix cannot hold more tokens than the packs; how much less best-fit needs is found by bisection.
  std::int64_t upper = 0;
  for (std::int64_t tokens = 0; upper < count; ++upper) {
    tokens += lengths[upper];
    if (tokens > budget * max_packs) break;
  }
  std::int64_t lower = std::min(count, max_packs);  // one each always fits
  while (lower < upper) {
    const std::int64_t middle = lower + (upper - lower + 1) / 2;
    const Packs trial = pack_sequences(lengths, middle, budget);
    if (static_cast<std::int64_t>(trial.offsets.size()) - 1 <= max_packs) {
      lower = middle;
    } else {
      upper = middle - 1;
    }
  }
  std::vector<std::int32_t> members;
  std::vector<std::int32_t> pack_of;
  OpenPacks open(budget);
  for (const std::int32_t index : longest_first(lengths, lower, budget)) {
    const std::int32_t pack = open.place(lengths[index]);
    members.push_back(index);
    pack_of.push_back(pack != kNone ? pack : open.open(budget - lengths[index]));
  }
  for (std::int64_t index = lower; index < count; ++index) {
    std::int32_t pack = open.place(lengths[index]);
    if (pack == kNone && open.count() < max_packs) pack = open.open(budget - lengths[index]);
    if (pack == kNone) continue;
    members.push_back(static_cast<std::int32_t>(index));
    pack_of.push_back(pack);
  }
  return collect(members, pack_of, open.count());
}

}  // namespace forge::data_plane
