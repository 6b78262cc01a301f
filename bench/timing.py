"""Interleaved timing, and the roofline of the machine measured in the same run."""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch

from bench.registry import Remote, Slow, Thunk

_L2_BYTES = 2**28  # more than any GPU's L2 cache


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
    candidates: Mapping[str, Thunk | Slow | Remote], *, seconds: float, min_rounds: int = 5, max_rounds: int = 200
) -> dict[str, Timing]:
    """Times warm candidates against each other: in every round each runs once, in random order.

    Drift of the machine (frequency, other load) then hits all candidates alike, and the ratios hold.

    Args:
        candidates: what to call, each called before at least once.
        seconds: how long to go on, all candidates together; what `Slow` ones take is not counted.
        min_rounds: rounds made however long they take.
        max_rounds: rounds made at most.
    """
    clock = _gpu_clock() if torch.cuda.is_available() else _cpu_clock
    shuffle = random.Random(0).shuffle
    order = list(candidates)
    samples: dict[str, list[float]] = {name: [] for name in order}
    spent = 0.0
    rounds = 0
    while rounds < min_rounds or (rounds < max_rounds and spent < seconds):
        shuffle(order)
        for name in order:
            candidate = candidates[name]
            if isinstance(candidate, Slow):
                if rounds < candidate.rounds:
                    samples[name].append(clock(candidate.call))
                continue
            taken = candidate.seconds() if isinstance(candidate, Remote) else clock(candidate)
            samples[name].append(taken)
            spent += taken
        rounds += 1
    return {name: _summary(values) for name, values in samples.items()}


def one_call(thunk: Thunk) -> float:
    """Seconds of a single call."""
    return (_gpu_clock() if torch.cuda.is_available() else _cpu_clock)(thunk)


def _cpu_clock(thunk: Thunk) -> float:
    start = time.perf_counter()
    thunk()
    return time.perf_counter() - start


def _gpu_clock() -> Callable[[Thunk], float]:
    """Time between two events on the stream, from a cold L2 cache and with the launches queued up behind a kernel."""
    flush = torch.empty(_L2_BYTES // 4, device="cuda")

    def clock(thunk: Thunk) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        begin.record()
        thunk()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3

    return clock


def _summary(values: list[float]) -> Timing:
    ordered = sorted(values)
    return Timing(
        statistics.median(ordered),
        ordered[int(0.2 * (len(ordered) - 1))],
        ordered[int(0.8 * (len(ordered) - 1))],
        len(ordered),
    )


@dataclass(frozen=True)
class Roofline:
    """What this machine reached in this run: matmul FLOP/s by dtype and copy bandwidth in bytes/s (read + write)."""

    matmul: dict[str, float]
    copy: float

    def bound_seconds(self, dtype: str, flops: float, bytes: float) -> float:
        """The time below which a call of this work cannot go: the larger of its compute and its traffic."""
        return max(flops / self.matmul[dtype] if flops else 0.0, bytes / self.copy)

    def better(self, other: "Roofline") -> "Roofline":
        """The higher of each number: a disturbed measurement can only be too low."""
        matmul = {dtype: max(flops, other.matmul[dtype]) for dtype, flops in self.matmul.items()}
        return Roofline(matmul, max(self.copy, other.copy))


def measure_roofline(device: str, seconds: float = 0.7) -> Roofline:
    """Times square matmuls in float32 and bfloat16 and a copy that does not fit in any cache, `seconds` each.

    The inputs are random normal numbers: zeros draw less power and run faster than any real data.
    """
    size = 8192 if device == "cuda" else 2048
    matmul = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        timing = _warm_and_time(lambda a=a, b=b: a @ b, seconds)  # type: ignore[misc]
        matmul[str(dtype).removeprefix("torch.")] = 2 * size**3 / timing.p20
    source = torch.randn(2**28 // 4, device=device)
    target = torch.empty_like(source)
    timing = _warm_and_time(lambda: target.copy_(source), seconds)
    return Roofline(matmul, 2 * source.nbytes / timing.p20)


def _warm_and_time(thunk: Thunk, seconds: float) -> Timing:
    for _ in range(2):
        thunk()
    return interleaved({"": thunk}, seconds=seconds)[""]
