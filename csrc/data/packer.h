// Best-fit packing of sequences into packs of a fixed token budget.
#pragma once

#include <cstdint>
#include <vector>

namespace forge::data_plane {

// Pack i holds the sequences order[offsets[i]] .. order[offsets[i + 1] - 1].
struct Packs {
  std::vector<std::int64_t> order;
  std::vector<std::int64_t> offsets;
};

// Best-fit decreasing over all sequences: longest first, each into the fullest pack that still takes it.
// Equal lengths keep their input order, so the result is a function of the input alone.
// Throws std::invalid_argument naming the index of a negative length or of one over the budget.
Packs pack_sequences(const std::int64_t* lengths, std::int64_t count, std::int64_t budget);

// One training step: at most max_packs packs out of a waiting line in arrival order.
// The longest prefix of the line that best-fit packs into max_packs goes in whole, so nobody waits for ever;
// whoever comes later and fits a remaining gap fills it. The rest is not in the result and keeps waiting.
Packs pack_step(const std::int64_t* lengths, std::int64_t count, std::int64_t budget, std::int64_t max_packs);

}  // namespace forge::data_plane
