// Errors that name the argument, what came and what was expected.
#pragma once

#include <sstream>
#include <stdexcept>

// FORGE_CHECK(q.dim() == 3, "q", "a tensor of ", q.dim(), " dimensions", "[tokens, heads, d]")
//   -> q: got a tensor of 2 dimensions, expected [tokens, heads, d]
// `got` may be several values separated by commas inside FORGE_GOT(...).
#define FORGE_CHECK(condition, argument, got, expected)                                          \
  do {                                                                                           \
    if (!(condition)) {                                                                          \
      std::ostringstream forge_message;                                                          \
      forge_message << argument << ": got " << got << ", expected " << expected;                 \
      throw std::invalid_argument(forge_message.str());                                          \
    }                                                                                            \
  } while (0)
