"""Interleaved timing, and the roofline of the machine measured in the same run."""

import random
import statistics
import time
from dataclasses import asdict, dataclass

import torch

from bench.registry import Thunk


@dataclass(frozen=True)
class Timing:
    """Seconds per call over `rounds` calls."""

    median: float
    p20: float
    p80: float
    rounds: int

    def as_dict(self) -> dict[str, float]:
        """For the JSON report."""
        return asdict(self)


def interleaved(
    thunks: dict[str, Thunk], *, seconds: float, min_rounds: int = 5, max_rounds: int = 200
) -> dict[str, Timing]:
    """Times the thunks against each other: in every round each runs once, in random order, after two warm-up rounds.

    Drift of the machine (frequency, other load) then hits all candidates alike, and the ratios hold.

    Args:
        thunks: what to call.
        seconds: how long to go on, all thunks together.
        min_rounds: rounds made however long they take.
        max_rounds: rounds made at most.
    """
    order = list(thunks)
    shuffle = random.Random(0).shuffle
    samples: dict[str, list[float]] = {name: [] for name in thunks}
    for _ in range(2):
        for name in order:
            thunks[name]()
    _synchronize()
    begin = time.perf_counter()
    rounds = 0
    while rounds < min_rounds or (rounds < max_rounds and time.perf_counter() - begin < seconds):
        shuffle(order)
        for name in order:
            start = time.perf_counter()
            thunks[name]()
            _synchronize()
            samples[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: _summary(values) for name, values in samples.items()}


def _summary(values: list[float]) -> Timing:
    ordered = sorted(values)
    return Timing(
        statistics.median(ordered),
        ordered[int(0.2 * (len(ordered) - 1))],
        ordered[int(0.8 * (len(ordered) - 1))],
        len(ordered),
    )


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Roofline:
    """What this machine reached in this run: matmul FLOP/s by dtype and copy bandwidth in bytes/s (read + write)."""

    matmul: dict[str, float]
    copy: float

    def bound_seconds(self, dtype: str, flops: float, bytes: float) -> float:
        """The time below which a call of this work cannot go: the larger of its compute and its traffic."""
        return max(flops / self.matmul[dtype], bytes / self.copy)


def measure_roofline(device: str) -> Roofline:
    """Times square matmuls in float32 and bfloat16 and a copy that does not fit in any cache; takes about 2 seconds."""
    size = 8192 if device == "cuda" else 2048
    matmul = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        timing = interleaved({"matmul": lambda a=a, b=b: a @ b}, seconds=0.7)["matmul"]  # type: ignore[misc]
        matmul[str(dtype).removeprefix("torch.")] = 2 * size**3 / timing.p20
    source = torch.randn(2**28 // 4, device=device)
    target = torch.empty_like(source)
    timing = interleaved({"copy": lambda: target.copy_(source)}, seconds=0.5)["copy"]
    return Roofline(matmul, 2 * source.nbytes / timing.p20)
