"""Chooses between ways to compute the same result by timing them once on the GPU, and remembers the choice.

FORGE_TUNING=off uses every op's documented default instead; FORGE_TUNING=all also tries the ways that no GPU has run
yet (`UNPROVED`), as bench/gpu.sh does. Choices are kept in ~/.cache/forge_core/tuning.json (FORGE_TUNING_CACHE names
another file): ways may round differently, and a resumed run should not measure again and pick another one.
"""

import functools
import json
import math
import os
import statistics
import warnings
from collections.abc import Callable, Collection
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from ..registry import Refusal

Way = Callable[[], Tensor]
ROUNDS = 7
HOLD = 1 << 20  # cycles, half a millisecond
AGREE = 2**-5  # of the largest value: several roundings to bfloat16, far less than a wrong tile
MARGIN = 0.99  # of the default's time; below that another way replaces it
# Warp-specialised kernels that have only run in a simulator: an error in their barriers would hang the GPU, and no
# user's first call shall do that. Once `make gpu` has passed on a Hopper GPU, empty this.
UNPROVED = frozenset({"gluon", "gluon_pingpong", "gluon_dkdv", "gluon_forward"})

_choices: dict[str, str] | None = None
# What this process has taken, for each key: bench/ reports it.
taken: dict[str, str] = {}


def choose(
    key: str,
    ways: dict[str, Way],
    default: str,
    time: Callable[[dict[str, Way]], dict[str, float]] | None = None,
) -> str:
    """The fastest of `ways` for `key`: remembered, or measured now.

    Args:
        key: what the choice depends on, besides the GPU and the versions of torch and Triton.
        ways: each computes the result in one way; they must have no other effect. See `usable`.
        default: used where tuning is off, and while a CUDA graph is captured if there was no choice before; kept unless
            another way is 1 % faster.
        time: measures the ways in seconds; by default CUDA events on the current stream.
    """
    ways = {name: way for name, way in ways.items() if name == default or _may_run(name)}
    if len(ways) == 1:
        return default
    if time is None:
        if not torch.cuda.is_available():
            return default
        if torch.cuda.is_current_stream_capturing():
            return remembered(key, ways, default)
    of_gpu = key if time else _on_this_gpu(key)
    known = _known()
    if known.get(of_gpu) not in ways:
        candidates = usable(ways, default)
        if not candidates:
            return default
        seconds = (time or _time)(candidates)
        best = min(seconds, key=lambda way: seconds[way])
        known[of_gpu] = best if seconds[best] < MARGIN * seconds.get(default, float("inf")) else default
        _save(known)
    taken[key] = known[of_gpu]
    return known[of_gpu]


def remembered(key: str, ways: Collection[str], default: str) -> str:
    """What `choose` has chosen before, on this GPU; the default where it has not, or where tuning is off."""
    if not torch.cuda.is_available():
        return default
    way = _known().get(_on_this_gpu(key), default)
    taken[key] = way if way in ways and _may_run(way) else default
    return taken[key]


def _may_run(way: str) -> bool:
    tuning = os.environ.get("FORGE_TUNING")
    return tuning != "off" and (way not in UNPROVED or tuning == "all")


def _on_this_gpu(key: str) -> str:
    return f"{_gpu(torch.cuda.current_device())} torch {torch.__version__} triton {triton.__version__} {key}"


@functools.cache
def _gpu(device: int) -> str:
    return torch.cuda.get_device_name(device)


def usable(ways: dict[str, Way], default: str) -> dict[str, Way]:
    """The ways that run here, agree with the default and repeat bit for bit; others are left out, with a warning.

    None at all where the result is not finite: nothing can be compared with it.
    """
    expected = ways[default]()
    scale = _largest(expected)
    if not math.isfinite(scale):
        return {}
    found = {default: ways[default]}
    for way, run in ways.items():
        if way == default:
            continue
        try:
            result = run()
        except (TritonError, Refusal) as error:  # does not compile for this GPU, or wants more than it has
            warnings.warn(f"{way}: not used: {error}", stacklevel=2)
            continue
        difference = _largest(result - expected)
        if not difference <= AGREE * scale:
            warnings.warn(f"{way}: not used, its result is off by up to {difference:.3g}", stacklevel=2)
        elif not torch.equal(result, run()):
            warnings.warn(f"{way}: not used, its result does not repeat bit for bit", stacklevel=2)
        else:
            found[way] = run
    return found


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


def _time(ways: dict[str, Way]) -> dict[str, float]:
    # Interleaved rounds; every way has run before. Medians.
    samples: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way in samples:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(HOLD)  # launches queue up behind it: what is timed is the GPU, not Python
            start.record()
            ways[way]()
            end.record()
            end.synchronize()
            samples[way].append(start.elapsed_time(end) / 1e3)
    return {way: statistics.median(values) for way, values in samples.items()}


def cache_path() -> Path:
    """The file of remembered choices."""
    return Path(os.environ.get("FORGE_TUNING_CACHE") or Path.home() / ".cache" / "forge_core" / "tuning.json")


def forget() -> None:
    """Drops the choices in memory; those of the file are read again."""
    global _choices
    _choices = None


def _known() -> dict[str, str]:
    global _choices
    if _choices is None:
        _choices = _read(cache_path())
    return _choices


def _read(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected the choices of an earlier run as JSON, got {error}; delete it") from error


def _save(choices: dict[str, str]) -> None:
    path = cache_path()
    merged = _read(path) | choices  # other processes save too
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(merged, indent=1, sort_keys=True))
        temporary.replace(path)
    except OSError as error:  # a read-only home: this process goes on with its choices
        warnings.warn(f"{path}: choices are not kept for the next run: {error}", stacklevel=2)
