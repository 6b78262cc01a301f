"""JSON and Markdown of a run, with machine, versions and commit."""

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.load import DISTURBED
from bench.registry import Workload
from bench.timing import Roofline, Timing

_PACKAGES = (
    "forge-core", "torch", "triton", "transformers", "peft", "trl", "tokenizers", "numpy",
    "flash-attn", "liger-kernel", "cut-cross-entropy",
)  # fmt: skip


def environment(device: str) -> dict[str, Any]:
    """Machine, date, commit and package versions of this run."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False).stdout
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": (commit or "unknown") + ("+changes" if changed.strip() else ""),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {torch.backends.cpu.get_cpu_capability()}"
    return platform.processor() or platform.machine()


def row(
    workload: Workload,
    timings: Mapping[str, Timing],
    missing: Mapping[str, str],
    peaks: Mapping[str, int | None],
    roofline: Roofline,
    other_load: float | None = None,
) -> dict[str, Any]:
    """One workload's results as plain data.

    `of_roofline` is the bound of the work (see Roofline) over forge's median; `speedup` and `at_least` are times
    faster than the peer; `peak_bytes` is what one call needs above what is live (bench/memory.py); `other_load` is the
    number of cores that other processes used meanwhile.
    """
    ours = timings["forge"].median
    return _described(workload) | {
        "of_roofline": of_roofline(_described(workload), ours, roofline),
        "tokens_per_second": {name: workload.tokens / t.median for name, t in timings.items()}
        if workload.tokens
        else {},
        "seconds": {name: timing.as_dict() for name, timing in timings.items()},
        "speedup": {name: timing.median / ours for name, timing in timings.items() if name != "forge"},
        "peak_bytes": {name: peaks.get(name) for name in timings},
        "other_load": other_load,
        "missing": dict(missing),
    }


def of_roofline(item: Mapping[str, Any], seconds: float, roofline: Roofline) -> float:
    """Share of what the machine reached in this run that a row's work in that time comes to."""
    return roofline.bound_seconds(item["dtype"], item["flops"], item["bytes"]) / seconds


def failed_row(workload: Workload, reason: str, missing: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The row of a workload that forge itself could not do."""
    return _described(workload) | {"failed": reason, "missing": dict(missing or {})}


def _described(workload: Workload) -> dict[str, Any]:
    return {
        "op": workload.op,
        "shape": workload.shape,
        "dtype": workload.dtype,
        "flops": workload.flops,
        "bytes": workload.bytes,
        "tokens": workload.tokens,
        "note": workload.note,
        "at_least": dict(workload.at_least),
        "headline": workload.headline,
    }


def line(item: Mapping[str, Any]) -> str:
    """A row as a line of progress."""
    name = f"{item['op']} {item['shape']}"
    if "failed" in item:
        return f"{name}: FAILED: {item['failed']}"
    parts = [f"{name}: {time_text(item['seconds']['forge']['median'])}"]
    if item["of_roofline"]:
        parts.append(f"{item['of_roofline']:.0%} of the roofline")
    if item["tokens_per_second"]:
        parts.append(f"{item['tokens_per_second']['forge']:,.0f} tokens/s")
    if (item["other_load"] or 0.0) > DISTURBED:
        parts.append(f"DISTURBED by {item['other_load']:.2f} cores of other load")
    return ", ".join(parts) + "".join(f"  {peer}" for peer in _peers(item, memory=False))


def markdown(result: Mapping[str, Any]) -> str:
    """The run as a Markdown table; peers' columns say how many times slower than forge they are."""
    env, roofline = result["environment"], result["roofline"]
    lines = [
        f"{env['device']}, {env['threads']} threads, torch {env['versions']['torch']}, commit {env['commit'][:12]}"
        f"{'+changes' if env['commit'].endswith('+changes') else ''}, {env['date']}.",
        f"Roofline of this run: bf16 matmul {roofline['matmul']['bfloat16'] / 1e9:.0f} GFLOP/s, float32 "
        f"{roofline['matmul']['float32'] / 1e9:.0f}, copy {roofline['copy'] / 1e9:.0f} GB/s. "
        f"The suite took {result['wall_seconds']:.0f} s.",
        "",
        "| op | shape | forge (p20-p80) | of roofline | tokens/s | peak memory | peers: times slower, peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    notes: dict[str, None] = {}
    for item in result["rows"]:
        shape = item["shape"] if item["dtype"] == "bfloat16" else f"{item['shape']} {item['dtype']}"
        notes |= {item["note"]: None} if item["note"] else {}
        if item.get("chosen"):
            taken = "; ".join(f"{key}: {way}" for key, way in item["chosen"].items())
            notes[f"{item['op']} {shape} chose by measurement: {taken}."] = None
        if "failed" in item:
            lines.append(f"| {item['op']} | {shape} | FAILED: {item['failed']} | | | | {', '.join(_peers(item))} |")
            continue
        if (item["other_load"] or 0.0) > DISTURBED:
            shape += f" (disturbed: {item['other_load']:.2f} cores of other load)"
        ours = item["seconds"]["forge"]
        share = f"{item['of_roofline']:.0%}" if item["of_roofline"] else ""
        rate = f"{item['tokens_per_second']['forge']:,.0f}" if item["tokens_per_second"] else ""
        lines.append(
            f"| {item['op']} | {shape} | {time_text(ours['median'])} ({time_text(ours['p20'])}-"
            f"{time_text(ours['p80'])}) | {share} | {rate} | "
            f"{bytes_text(item['peak_bytes']['forge'])} | {', '.join(_peers(item))} |"
        )
    return "\n".join([*lines, *(f"\n{note}" for note in notes)]) + "\n"


def _peers(item: Mapping[str, Any], memory: bool = True) -> list[str]:
    texts = []
    for name, ratio in item.get("speedup", {}).items():
        wanted = item["at_least"].get(name)
        asked = f" (aim {wanted:g}x)" if wanted else ""
        peak = f", {bytes_text(item['peak_bytes'][name])}" if memory and item["peak_bytes"][name] is not None else ""
        texts.append(f"{name} {ratio:.2f}x{asked}{peak}")
    texts += [f"{name} missing ({why})" for name, why in item["missing"].items()]
    return [text.replace(", ", " ") if memory else text for text in texts]


def time_text(seconds: float) -> str:
    """A time with three digits and its unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds / scale < 100 else f"{seconds / scale:.0f} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def bytes_text(count: int | None) -> str:
    """A size in MiB, or GiB from one on."""
    if count is None:
        return ""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"


def compare(before: Path, after: Path) -> str:
    """A table of the times of two results of the same suite, row by row."""
    old, new = (json.loads(path.read_text()) for path in (before, after))
    lines = [f"{before} {old['environment']['commit'][:12]} -> {after} {new['environment']['commit'][:12]}"]
    by_name = {(r["op"], r["shape"], r["dtype"]): r for r in old["rows"]}
    for item in new["rows"]:
        key = (item["op"], item["shape"], item["dtype"])
        then, now = (_median(r) for r in (by_name.pop(key, {}), item))
        if now is None:
            lines.append(f"{' '.join(key)}: failed ({item['failed']})")
        elif then is None:
            lines.append(f"{' '.join(key)}: new, {time_text(now)}")
        else:
            lines.append(f"{' '.join(key)}: {time_text(then)} -> {time_text(now)} ({then / now:.2f}x)")
    lines += [f"{' '.join(key)}: gone" for key in by_name]
    return "\n".join(lines)


def _median(item: Mapping[str, Any]) -> float | None:
    return item["seconds"]["forge"]["median"] if "seconds" in item else None


def write(result: Mapping[str, Any], path: Path) -> None:
    """Writes `path` (JSON) and the same name with .md, each complete or not at all."""
    from forge_core.atomic import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result, indent=1) + "\n")
    write_text(path.with_suffix(".md"), markdown(result))
