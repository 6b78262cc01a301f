"""python -m bench run --suite cpu [--filter TEXT] [--json FILE]; python -m bench compare A.json B.json."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from bench import registry, report, timing
from bench.registry import Missing


def run(suite: str, pattern: str, seconds: float) -> dict[str, Any]:
    """Measures every matching workload, `seconds` each, and returns the result as plain data."""
    device = "cuda" if suite == "gpu" else "cpu"
    workloads = registry.load(suite, pattern)
    roofline = timing.measure_roofline(device)
    rows = []
    for workload in workloads:
        candidates = workload.build()
        thunks = {name: thunk for name, thunk in candidates.items() if not isinstance(thunk, Missing)}
        missing = {name: thunk for name, thunk in candidates.items() if isinstance(thunk, Missing)}
        timings = timing.interleaved(thunks, seconds=seconds)
        rows.append(report.row(workload, timings, missing, roofline))
        ours = timings["forge"].median
        peers = "  ".join(f"{name} {t.median / ours:.2f}x" for name, t in timings.items() if name != "forge")
        print(
            f"{workload.name}: {ours * 1e3:.2f} ms, {rows[-1]['of_roofline']:.0%} of the roofline  {peers}", flush=True
        )
    return {
        "suite": suite,
        "environment": report.environment(device),
        "roofline": {"matmul": roofline.matmul, "copy": roofline.copy},
        "rows": rows,
    }


def compare(before: Path, after: Path) -> str:
    """A table of the times of two results of the same suite, row by row."""
    old, new = (json.loads(path.read_text()) for path in (before, after))
    by_name = {(r["op"], r["shape"], r["dtype"]): r for r in old["rows"]}
    lines = [f"{before} {old['environment']['commit'][:12]} -> {after} {new['environment']['commit'][:12]}"]
    for item in new["rows"]:
        key = (item["op"], item["shape"], item["dtype"])
        now = item["seconds"]["forge"]["median"]
        if key not in by_name:
            lines.append(f"{' '.join(key)}: new, {now * 1e3:.2f} ms")
            continue
        then = by_name.pop(key)["seconds"]["forge"]["median"]
        lines.append(f"{' '.join(key)}: {then * 1e3:.2f} -> {now * 1e3:.2f} ms ({then / now:.2f}x)")
    lines += [f"{' '.join(key)}: gone" for key in by_name]
    return "\n".join(lines)


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of forge_core against its peers")
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="measure a suite")
    runner.add_argument("--suite", default="cpu", help="which suite (default: cpu)")
    runner.add_argument("--filter", default="", help="only workloads whose name contains this text")
    runner.add_argument("--seconds", type=float, default=2.0, help="time spent on each workload (default: 2)")
    runner.add_argument("--json", type=Path, help="write the result here, and as Markdown beside it")
    runner.add_argument("--threads", type=int, help="threads of torch's pool (default: torch's own choice)")
    comparer = commands.add_parser("compare", help="two results side by side")
    comparer.add_argument("before", type=Path)
    comparer.add_argument("after", type=Path)
    arguments = parser.parse_args()

    if arguments.command == "compare":
        print(compare(arguments.before, arguments.after))
        return 0
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        result = run(arguments.suite, arguments.filter, arguments.seconds)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        report.write(result, arguments.json)
    else:
        print("\n" + report.markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
