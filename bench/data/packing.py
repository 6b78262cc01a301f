"""pack_sequences, TokenMixer and PackPlan: the data plane, which knows no torch."""

from collections import defaultdict, deque

import numpy as np
from numpy.typing import NDArray

from bench.registry import Candidates, Slow, Thunk, peer, workload
from forge_core.kernels import PackPlan, TokenMixer, pack_sequences

DOCUMENTS, BUDGET = 100_000, 8192
SHARES = [0.5, 0.25, 0.15, 0.1]
DRAWS = 100_000


def log_normal(count: int, mean: int, seed: int = 0) -> NDArray[np.int64]:
    """Lengths of `count` documents, log-normal with sigma 1, from 8 to `BUDGET` tokens."""
    lengths = np.random.default_rng(seed).lognormal(np.log(mean) - 0.5, 1.0, count)
    return np.clip(lengths, 8, BUDGET).astype(np.int64)


def trl_best_fit(lengths: NDArray[np.int64]) -> Thunk:
    """TRL's best-fit decreasing: its segment tree of free rooms, and its queues of packs by room. Moves no tokens."""
    from trl.data_utils import _SegmentTree

    def pack_all() -> float:
        rooms = _SegmentTree(BUDGET)
        rooms.add(BUDGET)
        packs: list[list[int]] = []
        by_room: dict[int, deque[list[int]]] = defaultdict(deque)
        for index in np.argsort(-lengths, kind="stable").tolist():
            length = int(lengths[index])
            room = rooms.search(length)
            if room < BUDGET:
                pack = by_room[room].popleft()
                if not by_room[room]:
                    rooms.remove(room)
            else:
                packs.append(pack := [])
            pack.append(index)
            by_room[room - length].append(pack)
            if room > length:
                rooms.add(room - length)
        return float(len(packs))

    return pack_all


def largest_deficit(lengths: list[NDArray[np.int64]]) -> list[int]:
    """Draws from the source furthest behind its share, in Python: the usual rule, off by up to 1.7 sequences."""
    shares, drawn, position = np.array(SHARES), np.zeros(len(SHARES)), [0] * len(SHARES)
    order = []
    for _ in range(DRAWS):
        source = int((shares * drawn.sum() - drawn).argmax())
        drawn[source] += lengths[source][position[source]]
        position[source] += 1
        order.append(source)
    return order


@workload("pack_sequences", f"{DOCUMENTS:,} documents into {BUDGET}", suite="data", dtype="int64", headline=True)
def packing() -> Candidates:
    lengths = log_normal(DOCUMENTS, 400)
    return {
        "forge": lambda: float(len(pack_sequences(lengths, BUDGET)[1]) - 1),  # packs: the same number for both
        "TRL bfd": peer("trl", lambda: trl_best_fit(lengths), rounds=5),
    }


@workload("TokenMixer", f"{DRAWS:,} draws, {len(SHARES)} sources", suite="data", dtype="int64")
def mixing() -> Candidates:
    lengths = [log_normal(DRAWS, 300, seed) for seed in range(len(SHARES))]
    return {
        "forge": lambda: TokenMixer(SHARES).draw(lengths, max_draws=DRAWS),
        "largest deficit in NumPy": Slow(lambda: largest_deficit(lengths), 5),
    }


@workload(
    "PackPlan",
    f"{BUDGET} tokens",
    suite="data",
    dtype="int64",
    headline=True,
    note="PackPlan: meant to take at most 20 us.",
)
def planning() -> Candidates:
    import torch

    from bench.peers.attention import block_mask

    bounds = np.cumsum(log_normal(64, 330))
    cu_seqlens = np.array([0, *bounds[bounds < BUDGET], BUDGET], np.int32)
    lengths = np.diff(cu_seqlens).tolist()
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))

    def flex_block_mask() -> object:
        from torch.nn.attention.flex_attention import create_block_mask

        def visible(batch: torch.Tensor, head: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
            return (document[i] == document[j]) & (i >= j)

        return create_block_mask(visible, None, None, BUDGET, BUDGET, device="cpu")

    return {
        "forge": lambda: PackPlan(cu_seqlens),
        "FlexAttention block mask": Slow(flex_block_mask, 3),
        "dense mask": Slow(lambda: block_mask(lengths, "cpu"), 3),
    }
