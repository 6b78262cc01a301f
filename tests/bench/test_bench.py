import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import memory, readme, registry, report, timing
from bench.measure import measure
from bench.registry import Remote, Slow, Workload

ROOT = Path(__file__).parents[2]
ROOFLINE = timing.Roofline({"float32": 1e9, "bfloat16": 2e9}, copy=1e9)


def _workload(**options) -> Workload:  # type: ignore[no-untyped-def]
    return Workload("op", "4x4", "cpu", "float32", flops=1e6, bytes=8.0, **options)


def test_every_round_calls_every_candidate_once() -> None:
    calls: list[str] = []
    candidates = {
        "a": lambda: calls.append("a"),
        "b": lambda: calls.append("b"),
        "slow": Slow(lambda: calls.append("slow"), 2),
        "remote": Remote(lambda: 0.25, lambda: None),
    }
    timings = timing.interleaved(candidates, seconds=0.0, min_rounds=7)
    assert calls.count("a") == calls.count("b") == 7 and calls.count("slow") == 2
    assert timings["a"].rounds == 7 and timings["slow"].rounds == 2
    assert timings["a"].p20 <= timings["a"].median <= timings["a"].p80
    assert timings["remote"].median == 0.25


def test_peak_memory_counts_what_a_call_touches() -> None:
    kept = torch.ones(2**22)  # live before: not counted
    peak = memory.peak_bytes(lambda: (torch.ones(2**24) + 1).sum() + kept[0], "cpu")
    assert peak == pytest.approx(2 * 2**26, rel=0.1)


def test_a_peer_that_fails_is_named_and_never_dropped() -> None:
    def fails() -> None:
        raise NotImplementedError("training | on this\n device")

    candidates = {
        "forge": lambda: 1.0,
        "agrees": lambda: 1.001,
        "fails": fails,
        "differs": lambda: 2.0,
        "absent": registry.peer("no_such_package", lambda: lambda: 1.0),
        "unbuildable": registry.peer("torch", lambda: 1 / 0, rounds=2),  # type: ignore[arg-type,return-value]
    }
    row = measure(_workload(build=lambda: candidates), ROOFLINE, "cpu", 0.0)
    assert set(row["speedup"]) == {"agrees"}
    assert row["missing"]["fails"] == "NotImplementedError: training / on this device"
    assert "computes something else: 2.0" in row["missing"]["differs"]
    assert row["missing"]["absent"] == "no_such_package is not installed"
    assert row["missing"]["unbuildable"] == "ZeroDivisionError: division by zero"


def test_a_row_says_what_forge_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    tuning = SimpleNamespace(taken={"an earlier row": "x"})
    monkeypatch.setitem(sys.modules, "forge_core.kernels.gpu.tuning", tuning)
    calls = {"forge": lambda: tuning.taken.update({"op sizes": "cudnn"}), "peer": lambda: tuning.taken.update(peer="y")}
    item = measure(_workload(build=lambda: dict(calls)), ROOFLINE, "cpu", 0.0)
    assert item["chosen"] == {"op sizes": "cudnn"}
    assert "chose by measurement: op sizes: cudnn." in report.markdown(_result(1.0) | {"rows": [item]})


def test_a_workload_that_fails_keeps_its_row() -> None:
    def broken() -> dict:
        raise RuntimeError("out of memory")

    row = measure(_workload(build=broken), ROOFLINE, "cpu", 0.0)
    assert row["failed"] == "RuntimeError: out of memory"
    assert "FAILED: RuntimeError: out of memory" in report.line(row)


def _result(median: float, name: str = "op") -> dict:
    workload = Workload(
        name, "4x4", "cpu", "float32", 1e6, 8.0, dict, tokens=100, note="N", at_least={"peer": 4.0}, headline=True
    )
    timings = {
        "forge": timing.Timing(median, median, median, 5),
        "peer": timing.Timing(3 * median, median, median, 5),
        "faster": timing.Timing(median / 2, median, median, 5),
    }
    row = report.row(workload, timings, {"absent": "not installed"}, {"forge": 2**20, "peer": 3 * 2**30}, ROOFLINE)
    failed = report.failed_row(Workload("broken", "4x4", "cpu", "float32", 0.0, 0.0, dict), "ValueError: no")
    matmul = {"float32": 1e9, "bfloat16": 2e9}
    return {
        "suite": "cpu",
        "environment": report.environment("cpu"),
        "roofline": {"matmul": matmul, "copy": 1e9},
        "wall_seconds": 1.0,
        "rows": [row, failed],
    }


def test_report_names_ratio_roofline_memory_and_missing_peers(tmp_path: Path) -> None:
    result = _result(0.002)
    assert result["rows"][0]["of_roofline"] == pytest.approx(0.5)  # 1e6 FLOP at 1e9 FLOP/s is 1 ms, measured 2 ms
    assert result["rows"][0]["speedup"]["peer"] == pytest.approx(3.0)
    assert result["rows"][0]["tokens_per_second"]["forge"] == pytest.approx(50_000)
    report.write(result, tmp_path / "out.json")
    table = (tmp_path / "out.md").read_text()
    for text in ("peer 3.00x (aim 4x) 3.0 GiB", "absent missing (not installed)", "50%", "1 MiB", "\nN\n", "FAILED"):
        assert text in table
    assert json.loads((tmp_path / "out.json").read_text()) == result


def test_times_have_three_digits_and_a_unit() -> None:
    texts = [report.time_text(seconds) for seconds in (2.5, 0.1234, 0.00567, 12.34e-6, 5e-8)]
    assert texts == ["2.5 s", "123 ms", "5.67 ms", "12.3 us", "0.05 us"]


def test_compare_prints_the_ratio(tmp_path: Path) -> None:
    for name, median in (("a", 0.004), ("b", 0.002)):
        (tmp_path / f"{name}.json").write_text(json.dumps(_result(median)))
    assert "4 ms -> 2 ms (2.00x)" in report.compare(tmp_path / "a.json", tmp_path / "b.json")


def test_readme_table_replaces_what_is_between_the_markers(tmp_path: Path) -> None:
    file, result = tmp_path / "README.md", tmp_path / "cpu.json"
    file.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    result.write_text(json.dumps(_result(0.002)))
    readme.rewrite_file(file, [result])
    text = file.read_text()
    assert text.startswith(f"before\n{readme.BEGIN}\n") and text.endswith(f"\n{readme.END}\nafter\n")
    assert "old" not in text
    assert "| op | 4x4 | 2 ms (50,000 tokens/s) | 50% | 1 MiB | peer 3, faster **0.50** |" in text
    readme.rewrite_file(file, [result])
    assert file.read_text() == text
    with pytest.raises(ValueError, match="once each"):
        readme.rewrite("no markers", "table")


def test_unknown_workload_lists_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"no workload of suite 'cpu' contains 'nonsense'(.|\n)*rms_norm"):
        registry.load("cpu", "nonsense")
    with pytest.raises(ValueError, match="suite: got 'tpu', expected one of cpu, gpu"):
        registry.load("tpu")


def test_parts_share_out_all_workloads() -> None:
    names = [workload.name for workload in registry.load("gpu")]
    parts = [[workload.name for workload in registry.load("gpu", part=(i, 3))] for i in (1, 2, 3)]
    assert sorted(name for part in parts for name in part) == sorted(names) and len(set(names)) == len(names)


def test_runs_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "swiglu.json"
    command = [sys.executable, "-m", "bench", "run", "--filter", "swiglu 2048", "--peers", "eager", "--seconds", "0.05"]
    subprocess.run([*command, "--json", str(out)], cwd=ROOT, check=True, capture_output=True)
    (row,) = json.loads(out.read_text())["rows"]
    assert row["op"] == "swiglu" and set(row["speedup"]) == {"eager"} and row["peak_bytes"]["forge"] > 0
