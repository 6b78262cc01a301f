"""One row of a report: tries every candidate of a workload, measures its memory, then times all of them interleaved."""

import math
import sys
from collections.abc import Callable
from typing import Any

import torch

from bench import memory, registry, report, timing
from bench.load import OtherLoad
from bench.registry import Candidate, Lazy, Missing, Remote, Slow, Workload

_AGREE = 0.02  # candidates that return a number (a loss) must return the same one, up to this share of it


def measure(
    workload: Workload,
    roofline: timing.Roofline,
    device: str,
    seconds: float,
    peers: str = "",
    others: dict[str, Callable[[Workload], Candidate]] | None = None,
) -> dict[str, Any]:
    """One row of the result. A peer that fails is named as missing; where forge itself fails the row says so."""
    torch.manual_seed(0)
    try:
        candidates: dict[str, Candidate] = dict(workload.build())
    except Exception as error:  # one broken workload must not take the suite with it; the row shows the error
        return report.failed_row(workload, registry.reason(error))
    candidates = {name: c for name, c in candidates.items() if name == "forge" or peers in name}
    candidates |= {name: make(workload) for name, make in (others or {}).items()}
    ready: dict[str, Any] = {}
    missing: dict[str, str] = {}
    peaks: dict[str, int | None] = {}
    expected: float | None = None
    chosen: dict[str, str] = {}
    _taken().clear()
    for name, candidate in candidates.items():
        try:
            value, peaks[name] = try_once(candidate, device)
            if name == "forge":
                expected, chosen = value, dict(_taken())
            elif value is not None and expected is not None and not math.isclose(value, expected, rel_tol=_AGREE):
                raise ValueError(f"computes something else: {value:.4f}, forge {expected:.4f}")
            ready[name] = candidate
        except Exception as error:  # whatever a peer raises is its reason in the report
            missing[name] = candidate.reason if isinstance(candidate, Missing) else registry.reason(error)
    if "forge" not in ready:
        return report.failed_row(workload, missing.pop("forge", "no candidate is called forge"), missing)
    load = OtherLoad()
    timings = timing.interleaved(ready, seconds=seconds)
    return report.row(workload, timings, missing, peaks, roofline, load.cores()) | {"chosen": chosen}


def _taken() -> dict[str, str]:
    tuning = sys.modules.get("forge_core.kernels.gpu.tuning")  # loaded by the first op that chooses, on a GPU
    return tuning.taken if tuning else {}


def try_once(candidate: Candidate, device: str) -> tuple[float | None, int | None]:
    """The first calls of a candidate: its value where it is a number, and its peak memory in bytes."""
    if isinstance(candidate, Missing):
        raise RuntimeError(candidate.reason)
    if isinstance(candidate, Remote):
        return None, candidate.memory()
    call = candidate.call if isinstance(candidate, Slow) else candidate
    if isinstance(call, Lazy):
        call.prepare()
    value: list[object] = []
    if not isinstance(candidate, Slow):  # the first call compiles, packs weights, fills caches: not what a call takes
        value.append(call())
    peak = memory.peak_bytes(lambda: value.append(call()), device)
    return (value[0] if isinstance(value[0], float) else None), peak
