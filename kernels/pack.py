"""Data plane for NumPy arrays: packing, token-exact blending and the attention plan. Needs no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _data

_UNLIMITED = 2**63 - 1


def pack_sequences(lengths: ArrayLike, budget: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Packs sequences into as few packs of `budget` tokens as best-fit decreasing finds.

    Args:
        lengths: integers [n], tokens of each sequence; 0 is legal.
        budget: tokens a pack holds.

    Returns:
        (order int64 [n], pack_offsets int64 [packs + 1]); pack i holds the sequences
        `order[pack_offsets[i]:pack_offsets[i + 1]]`. Every sequence appears once; inside a pack longest first.

    Raises:
        TypeError: lengths are not integers.
        ValueError: a length is negative or over the budget (named by index), budget < 1.

    Best-fit decreasing (Johnson, "Near-optimal bin packing algorithms", 1973) needs at most 11/9 of the optimal
    number of packs + 1. O(n + budget): counting sort, and a bitmap of the rooms that some pack has left.
    """
    return _data.pack_sequences(_int64_vector(lengths, "lengths"), int(budget))


def pack_step(lengths: ArrayLike, budget: int, max_packs: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Fills at most `max_packs` packs from a waiting line; what does not fit keeps waiting.

    Args:
        lengths: integers [n], tokens of the waiting sequences, oldest first.
        budget: tokens a pack holds.
        max_packs: packs to fill.

    Returns:
        (order int64 [taken], pack_offsets int64 [packs + 1]) as `pack_sequences`. The oldest sequences go in
        without exception, as many as best-fit packs into `max_packs`; later ones fill the gaps that remain.

    Raises:
        TypeError: lengths are not integers.
        ValueError: a length is negative or over the budget (named by index), budget or max_packs < 1.
    """
    return _data.pack_step(_int64_vector(lengths, "lengths"), int(budget), int(max_packs))


def random_permutation(count: int, key: Sequence[int]) -> NDArray[np.int64]:
    """Permutation of range(count) as int64 [count], a function of (count, key) on every machine and version."""
    return _data.random_permutation(int(count), [int(part) for part in key])


class TokenMixer:
    """Chooses the source of each next sample so that token shares are met at every moment.

    After every draw, each source's tokens differ from `share * all tokens` by at most the longest sequence
    offered so far. Worst-case-fair weighted fair queueing (Bennett and Zhang, INFOCOM 1996), in exact integers.

    Args:
        shares: float [sources], sum 1; a source with share 0 is never drawn.
        seed: decides between sources that are exactly level.

    Raises:
        ValueError: a share is negative or not finite, or they do not sum to 1 within 1e-6.
    """

    def __init__(self, shares: Sequence[float], *, seed: int = 0) -> None:
        self._shares = [float(share) for share in shares]
        self._seed = int(seed)
        self._mixer = _data.TokenMixer(self._shares, self._seed % 2**64)

    def draw(
        self, lengths: Sequence[ArrayLike], *, max_draws: int | None = None, max_tokens: int | None = None
    ) -> NDArray[np.int32]:
        """Draws samples in order until a limit is met or a source that must be looked at has run out.

        Args:
            lengths: per source the tokens of its upcoming samples, integers [upcoming], each at least 1.
            max_draws: stop after that many samples.
            max_tokens: stop once at least that many tokens are drawn by this call.

        Returns:
            int32 [draws], the source of each sample; the k-th draw of a source is its k-th upcoming sample.

        Raises:
            TypeError: lengths are not integers.
            ValueError: another number of sources than shares, or a length below 1; nothing is drawn then.
        """
        vectors = [_int64_vector(source, f"lengths[{index}]") for index, source in enumerate(lengths)]
        draws = _UNLIMITED if max_draws is None else int(max_draws)
        return self._mixer.draw(vectors, draws, _UNLIMITED if max_tokens is None else int(max_tokens))

    @property
    def drawn(self) -> list[int]:
        """Tokens drawn so far from each source."""
        return self._mixer.drawn

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on drawing the same order; JSON-able."""
        return {"shares": self._shares, "seed": self._seed, "drawn": self._mixer.drawn}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from `state()`.

        Raises:
            ValueError: the state comes from a mixer with other shares or another seed.
        """
        for name, own in (("shares", self._shares), ("seed", self._seed)):
            if state[name] != own:
                raise ValueError(
                    f"TokenMixer state: {name} is {state[name]}, this mixer has {own}; "
                    "the order would differ, restore into a mixer built with the same arguments"
                )
        self._mixer.restore(state["drawn"])


@dataclass(frozen=True, eq=False)
class PackPlan:
    """Attention work of one pack, split into tiles once per batch, longest processing time first.

    Args:
        cu_seqlens: int32 [documents + 1], starts at 0, never falls; zero-length documents make no tile.
        q_tile, kv_tile: rows of a query tile and of a key tile, counted from each document's first row.
        causal: query i sees keys j <= i of its document; otherwise both directions.
        window: i - window < j (causal) or |i - j| < window; None for no limit.
        parents: int32 [documents], the document that each one continues, before it, or -1 (see packed_attention); None
            where none does.

    Attributes:
        forward: int32 [tiles, 8], one row per query tile with the columns of `COLUMNS`: rows are queries, cols
            the keys they read. Keys in [full_start, full_end) are visible to every query: no mask needed there.
        backward: the same with rows = keys and cols = the queries that read them (dK, dV without atomics).

    With parents the columns of a list are those in a tile's own document; `tiles_and_context` has the others.

    Raises:
        TypeError: cu_seqlens or parents are not int32.
        ValueError: cu_seqlens does not start at 0 or falls, a parent does not come before its document or there are
            parents without causal, a tile or the window is below 1.
    """

    cu_seqlens: NDArray[np.int32]
    q_tile: int = 64
    kv_tile: int = 64
    causal: bool = True
    window: int | None = None
    parents: NDArray[np.int32] | None = None
    forward: NDArray[np.int32] = field(init=False, repr=False)

    COLUMNS = ("document", "row_start", "row_end", "col_start", "col_end", "full_start", "full_end", "area")

    def __post_init__(self) -> None:
        cu_seqlens = np.ascontiguousarray(self.cu_seqlens)
        if cu_seqlens.dtype != np.int32 or cu_seqlens.ndim != 1:
            raise TypeError(
                f"cu_seqlens: got {cu_seqlens.dtype} {list(cu_seqlens.shape)}, expected int32 [documents + 1]"
            )
        if cu_seqlens.size == 0 or cu_seqlens[0] != 0 or (cu_seqlens[1:] < cu_seqlens[:-1]).any():
            raise ValueError(
                f"cu_seqlens: got {cu_seqlens[:8].tolist()}..., expected 0 followed by the end of each document"
            )
        for name in ("q_tile", "kv_tile", "window"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < 2**31:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        object.__setattr__(self, "cu_seqlens", cu_seqlens)
        if self.parents is not None:
            object.__setattr__(self, "parents", self._checked_parents())
        own = self.tiles(self.q_tile, self.kv_tile, backward=False, causal=self.causal, window=self.window)
        object.__setattr__(self, "forward", own)

    @cached_property
    def backward(self) -> NDArray[np.int32]:
        """See the class; made when it is first asked for."""
        return self.tiles(self.kv_tile, self.q_tile, backward=True, causal=self.causal, window=self.window)

    def tiles(
        self, row_tile: int, col_tile: int, *, backward: bool, causal: bool, window: int | None
    ) -> NDArray[np.int32]:
        """A list as `forward` or `backward` for other tile sizes, causality and window; int32 [tiles, 8]."""
        return self.tiles_and_context(row_tile, col_tile, backward=backward, causal=causal, window=window)[0]

    def tiles_and_context(
        self, row_tile: int, col_tile: int, *, backward: bool, causal: bool, window: int | None, tokens: int = 0
    ) -> tuple[NDArray[np.int32], NDArray[np.int32] | None]:
        """`tiles`, and with parents all columns of each: also in documents that it continues, or that continue it.

        Args:
            row_tile, col_tile, backward, causal, window: as for `tiles`.
            tokens: rows of the pack; those past the last document get tiles without columns at the end of the list.

        Returns:
            (tiles int32 [tiles, 8], context int32 [tiles + 1 + 5 * ranges]). `context[t]:context[t + 1]` are the places
            in `context` of tile t's ranges, of five numbers each: col_start, col_end, full_start, full_end as in
            `COLUMNS`, and gap; the first range is that of the tile's row. In a range key j is visible to query i iff it
            is to query `i - gap` by the rule of one document; gap is 0 without a window. Without one a tile of
            `backward` may also reach past its document, into those behind it that continue it.
        """
        limit = window or 0
        if self.parents is None:
            tiles = _data.make_tiles(self.cu_seqlens, row_tile, col_tile, causal, limit, backward, tokens)
            return tiles, None
        return _data.make_tree_tiles(self.cu_seqlens, self.parents, row_tile, col_tile, limit, backward, tokens)

    def _checked_parents(self) -> NDArray[np.int32]:
        parents, documents = np.ascontiguousarray(self.parents), self.cu_seqlens.size - 1
        if parents.dtype != np.int32 or parents.shape != (documents,):
            raise TypeError(
                f"parents: got {parents.dtype} {list(parents.shape)}, expected int32 [documents], here [{documents}]"
            )
        bad = np.flatnonzero((parents < -1) | (parents >= np.arange(documents)))
        if bad.size:
            raise ValueError(
                f"parents: got {parents[bad[0]]} at index {bad[0]}, expected -1, or a document before {bad[0]}"
            )
        if not self.causal:
            raise ValueError("causal: got False with parents: a document would have to see those that continue it")
        return parents

    @property
    def tokens(self) -> int:
        """Rows that belong to a document: `cu_seqlens[-1]`."""
        return int(self.cu_seqlens[-1])

    @property
    def max_seqlen(self) -> int:
        """Rows of the longest document."""
        return int(np.diff(self.cu_seqlens).max(initial=0))


def _int64_vector(values: ArrayLike, name: str) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name}: got {array.dtype} {list(array.shape)}, expected a vector of integers")
    return np.ascontiguousarray(array, dtype=np.int64)
