"""Step 6, mix: the endless order of samples in which every source keeps its share of the tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge_core.kernels.pack import TokenMixer, random_permutation

_WINDOW = 256  # upcoming samples of each source that the mixer is shown at a time


class MixedOrder:
    """Draws (source, sample) pairs for ever; a function of (lengths, shares, seed) alone.

    Each source is walked in an order of its own, permuted anew every epoch by (seed, source, epoch).

    Args:
        lengths: per source the tokens that count for its share, int64 [samples], each at least 1.
        shares: float [sources], sum 1.
        seed: any integer.
    """

    def __init__(self, lengths: Sequence[NDArray[np.int64]], shares: Sequence[float], seed: int) -> None:
        self._lengths = list(lengths)
        self._seed = seed % 2**64
        self._mixer = TokenMixer(shares, seed=self._seed)
        self._epoch = [0] * len(self._lengths)
        self._position = [0] * len(self._lengths)
        self._order = [self._permutation(source) for source in range(len(self._lengths))]

    def draw(self, count: int) -> list[tuple[int, int]]:
        """The next `count` samples as (source, index)."""
        drawn: list[tuple[int, int]] = []
        while len(drawn) < count:
            windows = [self._upcoming(source) for source in range(len(self._lengths))]
            lengths = [self._lengths[source][window] for source, window in enumerate(windows)]
            taken = [0] * len(windows)
            for source in self._mixer.draw(lengths, max_draws=count - len(drawn)).tolist():
                drawn.append((source, int(windows[source][taken[source]])))
                taken[source] += 1
            for source, number in enumerate(taken):
                self._position[source] += number
        return drawn

    def state(self) -> dict[str, Any]:
        """What `restore` needs; JSON-able."""
        return {"mixer": self._mixer.state(), "epoch": list(self._epoch), "position": list(self._position)}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from `state()` of an order made with the same arguments."""
        self._mixer.restore(state["mixer"])
        self._epoch = list(state["epoch"])
        self._position = list(state["position"])
        self._order = [self._permutation(source) for source in range(len(self._lengths))]

    def _permutation(self, source: int) -> NDArray[np.int64]:
        return random_permutation(self._lengths[source].size, [self._seed, source, self._epoch[source]])

    def _upcoming(self, source: int) -> NDArray[np.int64]:
        if self._position[source] == self._order[source].size:
            self._epoch[source] += 1
            self._position[source] = 0
            self._order[source] = self._permutation(source)
        start = self._position[source]
        return self._order[source][start : start + _WINDOW]
