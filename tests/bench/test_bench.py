import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import registry, report, timing
from bench.__main__ import compare
from bench.registry import Missing, Workload

ROOT = Path(__file__).parents[2]


def test_every_round_calls_every_candidate_once() -> None:
    calls: list[str] = []
    timings = timing.interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0.0, min_rounds=7
    )
    assert calls.count("a") == calls.count("b") == 7 + 2  # two warm-up rounds
    assert timings["a"].rounds == 7
    assert timings["a"].p20 <= timings["a"].median <= timings["a"].p80


def _result(median: float) -> dict:
    workload = Workload("op", "4x4", "cpu", "float32", flops=1e6, bytes=8.0, build=dict)
    roofline = timing.Roofline({"float32": 1e9, "bfloat16": 2e9}, copy=1e9)
    timings = {
        "forge": timing.Timing(median, median, median, 5),
        "peer": timing.Timing(3 * median, median, median, 5),
    }
    row = report.row(workload, timings, {"absent": Missing("not installed")}, roofline)
    matmul = {"float32": 1e9, "bfloat16": 2e9}
    return {"environment": report.environment("cpu"), "roofline": {"matmul": matmul, "copy": 1e9}, "rows": [row]}


def test_report_names_ratio_roofline_and_missing_peers(tmp_path: Path) -> None:
    result = _result(0.002)
    assert result["rows"][0]["of_roofline"] == pytest.approx(0.5)  # 1e6 FLOP at 1e9 FLOP/s is 1 ms, measured 2 ms
    assert result["rows"][0]["speedup"]["peer"] == pytest.approx(3.0)
    report.write(result, tmp_path / "out.json")
    table = (tmp_path / "out.md").read_text()
    assert "peer 3.00x" in table and "absent missing (not installed)" in table and "50%" in table
    assert json.loads((tmp_path / "out.json").read_text()) == result


def test_compare_prints_the_ratio(tmp_path: Path) -> None:
    for name, median in (("a", 0.004), ("b", 0.002)):
        (tmp_path / f"{name}.json").write_text(json.dumps(_result(median)))
    assert "4.00 -> 2.00 ms (2.00x)" in compare(tmp_path / "a.json", tmp_path / "b.json")


def test_unknown_workload_lists_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"no workload of suite 'cpu' contains 'nonsense'(.|\n)*rms_norm"):
        registry.load("cpu", "nonsense")


def test_runs_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "rms.json"
    command = [sys.executable, "-m", "bench", "run", "--filter", "rms_norm", "--seconds", "0.05", "--json", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (row,) = json.loads(out.read_text())["rows"]
    assert row["op"] == "rms_norm" and set(row["speedup"]) == {"F.rms_norm", "eager"}
