// One source, several instruction sets.
//
// Every csrc/cpu/<op>.cpp is compiled once per instruction set, with FORGE_ISA naming it (portable, avx2, avx512) and
// FORGE_ISA_LEVEL counting it. The part inside `namespace forge::FORGE_ISA` holds the loops; the part under
// `#if FORGE_ISA_LEVEL == 0` is the op itself and is compiled once. The loops register themselves here and the op calls
// kernels<K>(), which picks the best set that this CPU has (or the one that FORGE_CPU_ISA names) at run time. Loops for
// the bfloat16 dot product of AVX512-BF16 lie in csrc/cpu/avx512_bf16/ and are compiled for that level alone; what has
// none there runs those of avx512.
//
// Rules that keep an AVX-512 instruction from reaching a CPU without it: loops use no std:: templates and no torch
// headers (their inline functions would be merged across the compilations), only raw pointers and what vec.h defines.
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef FORGE_ISA
#error "CMakeLists.txt defines FORGE_ISA and FORGE_ISA_LEVEL for every file of csrc/cpu"
#endif

namespace forge {

constexpr int kIsaLevels = 4;  // portable, avx2, avx512, avx512_bf16

// Level in use: the highest that the CPU and the build have, or FORGE_CPU_ISA. Throws when the named one is missing.
int active_isa_level();

// Whether the level in use has the bfloat16 dot product.
inline bool has_bf16_dot_product() { return active_isa_level() >= 3; }

template <class K>
struct IsaTable {
  static inline K entries[kIsaLevels] = {};
  static inline bool present[kIsaLevels] = {};
};

template <class K>
struct RegisterKernels {
  explicit RegisterKernels(const K& kernels) {
    // Runs when the library is loaded, on every CPU: copied word by word, since a struct copy would be made of vector
    // instructions of this level. `volatile` keeps the compiler from joining the words again.
    typedef uintptr_t __attribute__((may_alias)) Word;
    static_assert(sizeof(K) % sizeof(Word) == 0, "K is a struct of function pointers");
    volatile Word* to = reinterpret_cast<volatile Word*>(&IsaTable<K>::entries[FORGE_ISA_LEVEL]);
    const Word* from = reinterpret_cast<const Word*>(&kernels);
    for (size_t i = 0; i < sizeof(K) / sizeof(Word); ++i) to[i] = from[i];
    IsaTable<K>::present[FORGE_ISA_LEVEL] = true;
  }
};

// The loops of an op for the active instruction set. K is a struct of function pointers declared by the op's file.
template <class K>
const K& kernels() {
  int level = active_isa_level();
  while (level > 0 && !IsaTable<K>::present[level]) --level;
  return IsaTable<K>::entries[level];
}

}  // namespace forge
