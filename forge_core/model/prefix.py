"""Prompts that begin alike, as one pack in which what they share stands once."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

_LEAST_SAVED = 16  # tokens: what a document of its own, with its tiles of attention, should save at least


@dataclass(frozen=True)
class PrefixPack:
    """A pack whose documents continue each other as the prompts do: a tree of prefixes.

    input_ids: int64 [tokens].
    cu_seqlens, parents: int32 [documents + 1] and [documents], as in packed_attention.
    rows: for each prompt int64 [its tokens], where they stand in the pack.
    """

    input_ids: NDArray[np.int64]
    cu_seqlens: NDArray[np.int32]
    parents: NDArray[np.int32]
    rows: list[NDArray[np.int64]]


def pack_prefixes(prompts: Sequence[Sequence[int]]) -> PrefixPack:
    """Packs prompts, each at least one token; a shared prefix stands once where that saves at least 16 tokens."""
    order = sorted(range(len(prompts)), key=lambda i: list(prompts[i]))
    texts = [np.asarray(prompts[i], dtype=np.int64) for i in order]
    pieces: list[NDArray[np.int64]] = []
    bounds, parents = [0], []
    rows: list[NDArray[np.int64]] = [np.empty(0, np.int64)] * len(prompts)
    # Groups of neighbours [low, high) that begin alike; their first `done` tokens stand in the pack, at `prefix`, the
    # last of them in document `parent`.
    groups = [(0, len(texts), 0, np.empty(0, np.int64), -1)]
    while groups:
        low, high, done, prefix, parent = groups.pop()
        common = common_prefix(texts[low], texts[high - 1])  # of the whole group: it is sorted
        if high - low == 1 or (common - done) * (high - low - 1) >= _LEAST_SAVED:
            pieces.append(texts[low][done:common])
            bounds.append(bounds[-1] + common - done)
            parents.append(parent)
            prefix, parent = np.concatenate([prefix, np.arange(bounds[-2], bounds[-1])]), len(parents) - 1
            done = common
        while low < high and texts[low].size == common:  # the first of a sorted group
            if done == common:
                rows[order[low]] = prefix
            else:
                groups.append((low, low + 1, done, prefix, parent))
            low += 1
        following = np.array([text[common] for text in texts[low:high]])
        edges = low + np.flatnonzero(np.diff(following)) + 1
        groups += [(a, b, done, prefix, parent) for a, b in pairwise([low, *edges.tolist(), high]) if a < b]
    return PrefixPack(np.concatenate(pieces), np.array(bounds, np.int32), np.array(parents, np.int32), rows)


def common_prefix(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """Number of tokens in which a and b agree from the first on."""
    size = min(a.size, b.size)
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if differ.size else size
