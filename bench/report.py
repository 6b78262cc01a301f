"""JSON and Markdown of a run, with machine, versions and commit."""

import importlib.metadata
import json
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.registry import Missing, Workload
from bench.timing import Roofline, Timing

_PACKAGES = ("forge-core", "torch", "triton", "transformers", "peft", "numpy")


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
    workload: Workload, timings: dict[str, Timing], missing: dict[str, Missing], roofline: Roofline
) -> dict[str, Any]:
    """One workload's results as plain data; `of_roofline` is the bound of the work over the median time of forge."""
    ours = timings["forge"].median
    return {
        "op": workload.op,
        "shape": workload.shape,
        "dtype": workload.dtype,
        "flops": workload.flops,
        "bytes": workload.bytes,
        "of_roofline": roofline.bound_seconds(workload.dtype, workload.flops, workload.bytes) / ours,
        "seconds": {name: timing.as_dict() for name, timing in timings.items()},
        "speedup": {name: timing.median / ours for name, timing in timings.items() if name != "forge"},
        "missing": {name: reason.reason for name, reason in missing.items()},
    }


def markdown(result: dict[str, Any]) -> str:
    """The run as a Markdown table; peers' columns say how many times slower than forge they are."""
    env, roofline = result["environment"], result["roofline"]
    lines = [
        f"{env['device']}, {env['threads']} threads, torch {env['versions']['torch']}, commit {env['commit'][:12]}, "
        f"{env['date']}.",
        f"Roofline of this run: bf16 matmul {roofline['matmul']['bfloat16'] / 1e9:.0f} GFLOP/s, float32 "
        f"{roofline['matmul']['float32'] / 1e9:.0f}, copy {roofline['copy'] / 1e9:.0f} GB/s.",
        "",
        "| op | shape | dtype | forge ms (p20-p80) | of roofline | peers: times slower |",
        "|---|---|---|---|---|---|",
    ]
    for item in result["rows"]:
        ours = item["seconds"]["forge"]
        peers = [f"{name} {ratio:.2f}x" for name, ratio in item["speedup"].items()]
        peers += [f"{name} missing ({reason})" for name, reason in item["missing"].items()]
        lines.append(
            f"| {item['op']} | {item['shape']} | {item['dtype']} | {ours['median'] * 1e3:.2f} "
            f"({ours['p20'] * 1e3:.2f}-{ours['p80'] * 1e3:.2f}) | {item['of_roofline']:.0%} | {', '.join(peers)} |"
        )
    return "\n".join(lines) + "\n"


def write(result: dict[str, Any], path: Path) -> None:
    """Writes `path` (JSON) and the same name with .md, each complete or not at all."""
    from forge_core.atomic import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result, indent=1) + "\n")
    write_text(path.with_suffix(".md"), markdown(result))
