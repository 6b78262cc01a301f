"""The README's table of measured numbers, written from result files between two marker comments."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.report import bytes_text, time_text

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def rewrite_file(readme: Path, results: Sequence[Path]) -> None:
    """Puts the table of these results into the file; complete or not at all.

    Raises:
        ValueError: the file does not have the two markers, or no row of the results is meant for it.
    """
    from forge_core.atomic import write_text

    loaded = [json.loads(path.read_text()) for path in results]
    write_text(readme, rewrite(readme.read_text(), table(loaded)))


def rewrite(text: str, replacement: str) -> str:
    """`text` with `replacement` between the markers.

    Raises:
        ValueError: the markers are not there once each, in order.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end) or BEGIN in tail or END in tail:
        raise ValueError(f"README: expected {BEGIN} and then {END}, once each")
    return f"{head}{BEGIN}\n{replacement.strip()}\n{END}{tail}"


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The headline rows of the results; ratios below 1, where a peer is faster, are bold (not so for a floor).

    Raises:
        ValueError: there are none.
    """
    lines = []
    for result in results:
        rows = [row for row in result["rows"] if row["headline"]]
        if not rows:
            raise ValueError(f"results: suite {result['suite']!r} has no row that the README shows")
        env = result["environment"]
        lines += [
            f"{env['device']}, {env['threads']} threads, torch {env['versions']['torch']}, commit "
            f"{env['commit'][:12]}, {env['date'][:10]}; bf16 matmul peak of the run "
            f"{result['roofline']['matmul']['bfloat16'] / 1e9:.0f} GFLOP/s:",
            "",
            "| op | shape | time | of roofline | peak memory | times faster than |",
            "|---|---|---|---|---|---|",
            *_rows(rows),
            "",
        ]
    lines.append(
        "Medians of interleaved rounds in one process, bfloat16, forward and backward unless the shape says otherwise. "
        "`make bench` measures them on your machine; all rows, with spread, peak memory and missing peers, are in "
        "`bench/results/`."
    )
    return "\n".join(lines)


def _rows(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines, before = [], ""
    for row in rows:
        op = "same" if row["op"] == before else row["op"]
        before = row["op"]
        if "failed" in row:
            lines.append(f"| {op} | {row['shape']} | failed: {row['failed']} | | | |")
            continue
        faster = [f"{name} {_winning(ratio)}" for name, ratio in row["speedup"].items() if ratio >= 1]
        slower = [f"{name} {_losing(name, ratio)}" for name, ratio in row["speedup"].items() if ratio < 1]
        seconds = time_text(row["seconds"]["forge"]["median"])
        share = f"{row['of_roofline']:.0%}" if row["of_roofline"] else ""
        if row["tokens_per_second"]:
            seconds += f" ({row['tokens_per_second']['forge']:,.0f} tokens/s)"
        lines.append(
            f"| {op} | {row['shape']} | {seconds} | {share} | "
            f"{bytes_text(row['peak_bytes']['forge'])} | {', '.join(faster + slower)} |"
        )
    return lines


def _winning(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.2g}"


def _losing(name: str, ratio: float) -> str:
    return f"{ratio:.2f}" if name.startswith("floor") else f"**{ratio:.2f}**"
