"""Where the time of one op goes: a loop under torch.profiler; on CUDA with NVTX ranges and the `ncu` command line."""

import re
import shlex
import sys

import torch
from torch.profiler import ProfilerActivity

from bench import registry, timing
from bench.registry import Missing, Slow, Thunk, suite_device
from bench.report import time_text


def profile(op: str, shape: str, suite: str, candidate: str, calls: int, top: int) -> str:
    """Profiles a candidate of the first workload of `op` whose shape contains `shape`; returns the table.

    Raises:
        ValueError: no such workload or candidate, or the candidate cannot run here.
    """
    found = [workload for workload in registry.load(suite) if workload.op == op and shape in workload.shape]
    if not found:
        known = "\n  ".join(workload.name for workload in registry.load(suite))
        raise ValueError(f"no workload of op {op!r} with shape {shape!r} in suite {suite!r}; there are:\n  {known}")
    torch.manual_seed(0)
    candidates = found[0].build()
    thunk = candidates.get(candidate, Missing(f"not one of {', '.join(candidates)}"))
    if isinstance(thunk, Missing):
        raise ValueError(f"candidate {candidate!r}: {thunk.reason}")
    call = thunk.call if isinstance(thunk, Slow) else thunk
    for _ in range(2):
        call()
    quiet = min(timing.one_call(call) for _ in range(3))
    device = suite_device(suite)
    table = _table(call, calls, top, device)
    head = f"{found[0].name}, {candidate}: {time_text(quiet)} a call without the profiler"
    if device == "cuda":
        _nvtx_call(call)
        table += f"\n\nOne kernel in detail:\n{_ncu(op, shape, suite)}"
    return f"{head}\n{table}"


def _table(call: Thunk, calls: int, top: int, device: str) -> str:
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with torch.profiler.profile(activities=activities) as run:
        for _ in range(calls):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = [(_readable(event.key), getattr(event, key), event.count) for event in run.key_averages()]
    events.sort(key=lambda event: -event[1])
    total = sum(microseconds for _, microseconds, _ in events) or 1.0
    lines = [f"{'self ' + device.upper() + ' time a call':>20} {'share':>7} {'sum':>7} {'calls':>7}  name"]
    share_so_far = 0.0
    for name, microseconds, count in events[:top]:
        share_so_far += microseconds / total
        lines.append(
            f"{time_text(microseconds * 1e-6 / calls):>20} {microseconds / total:>7.1%} {share_so_far:>7.1%} "
            f"{count / calls:>7g}  {name[:90]}"
        )
    return "\n".join(lines)


def _readable(name: str) -> str:
    """The forward of an op with registered autograd runs under the name of its autograd wrapper."""
    return re.sub(r"^GeneratedBackwardFor_forge_(\w+)_default$", r"forge::\1 (forward)", name)


def _nvtx_call(call: Thunk) -> None:
    """One more call for Nsight, every op in a range of its own; apart from torch.profiler, which would trace it too."""
    with torch.cuda.nvtx.range("bench profile"), torch.autograd.profiler.emit_nvtx(record_shapes=True):
        call()
        torch.cuda.synchronize()


def _ncu(op: str, shape: str, suite: str) -> str:
    call = [sys.executable, "-m", "bench", "profile", op, "--shape", shape, "--suite", suite, "--calls", "1"]
    return "ncu --set full --nvtx --nvtx-include 'bench profile/' " + shlex.join(call)
