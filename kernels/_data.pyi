from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

def pack_sequences(lengths: NDArray[np.int64], budget: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...
def pack_step(
    lengths: NDArray[np.int64], budget: int, max_packs: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...
def random_permutation(count: int, key: Sequence[int]) -> NDArray[np.int64]: ...
def make_tiles(
    cu_seqlens: NDArray[np.int32],
    row_tile: int,
    col_tile: int,
    causal: bool,
    window: int,
    backward: bool,
    tokens: int,
) -> NDArray[np.int32]: ...
def make_tree_tiles(
    cu_seqlens: NDArray[np.int32],
    parents: NDArray[np.int32],
    row_tile: int,
    col_tile: int,
    window: int,
    backward: bool,
    tokens: int,
) -> tuple[NDArray[np.int32], NDArray[np.int32]]: ...

class TokenMixer:
    def __init__(self, shares: Sequence[float], seed: int) -> None: ...
    def draw(self, lengths: Sequence[NDArray[np.int64]], max_draws: int, max_tokens: int) -> NDArray[np.int32]: ...
    @property
    def drawn(self) -> list[int]: ...
    def restore(self, drawn: Sequence[int]) -> None: ...
