"""Runs a suite, here or in a child process, between two measurements of the machine's ceilings."""

import math
import time
from collections.abc import Callable
from typing import Any

from bench import report, timing
from bench.isolate import Isolated
from bench.measure import measure
from bench.registry import Candidate, Workload, suite_device

NOT_MEASURED = "not measured"  # begins the reason of a workload that there was no time for

Say = Callable[[str], None]


def run(
    suite: str,
    workloads: list[Workload],
    *,
    seconds: float,
    peers: str = "",
    base: Callable[[Workload], Candidate] | None = None,
    base_name: str = "base",
    isolate: bool = False,
    minutes: float = math.inf,
    say: Say = print,
) -> dict[str, Any]:
    """Measures the workloads, `seconds` each, and returns the result as plain data.

    Args:
        suite: name of the suite.
        workloads: what to measure.
        seconds: time spent on each workload, slow peers not counted.
        peers: only peers whose name contains this text.
        base: gives the same workload of another commit as a candidate, called `base_name`.
        base_name: see base.
        isolate: measure in a child process that is replaced when a workload kills it; not together with `base`.
        minutes: no workload begins after so many; the rest is listed as not measured.
        say: takes a line of progress.
    """
    device = suite_device(suite)
    begin = time.monotonic()
    roofline = timing.measure_roofline(device, min(seconds, 0.7))
    child = Isolated(suite, seconds, peers) if isolate else None
    rows = []
    for workload in workloads:
        if time.monotonic() - begin > 60 * minutes:
            rows.append(report.failed_row(workload, f"{NOT_MEASURED}, {minutes:g} minutes were over"))
        elif child:
            rows.append(child.measure(workload, roofline))
        else:
            rows.append(measure(workload, roofline, device, seconds, peers, {base_name: base} if base else {}))
        say(report.line(rows[-1]))
    if child:
        child.close()
    roofline = roofline.better(timing.measure_roofline(device, min(seconds, 0.7)))
    for row in rows:
        if "seconds" in row:
            row["of_roofline"] = report.of_roofline(row, row["seconds"]["forge"]["median"], roofline)
    return {
        "suite": suite,
        "environment": report.environment(device),
        "roofline": {"matmul": roofline.matmul, "copy": roofline.copy},
        "wall_seconds": time.monotonic() - begin,
        "rows": rows,
    }
