"""What the runs' metrics say: one table, report.md and the picture's data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from forge_core.atomic import write_text

from .assets import Asset

Results = Mapping[str, Mapping[str, Any]]

DOMAIN_SET = "icd"
UNSEEN_SET = "mmlu"  # the general set of which neither arm has seen the like
MAX_UNSEEN_RISE = 1.0  # percent of the base's loss
MIN_RATIO = 5.0  # domain-only's rise over the mixed arm's
MIN_ACCURACY = 0.9


@dataclass(frozen=True)
class Arm:
    """One training run as its metrics.jsonl tells it.

    Attributes:
        name: "domain only" or "mixed".
        evaluations: step -> results of all sets at that step; step 0 is the base.
        shares: realised token share of every source over the whole run.
        domain_tokens: domain tokens the run has trained on.
        seconds: training time without evaluations.
        wall_seconds: of the whole run.
    """

    name: str
    evaluations: Mapping[int, Results]
    shares: Mapping[str, float]
    domain_tokens: int
    seconds: float
    wall_seconds: float

    @property
    def base(self) -> Results:
        """Results before the first step."""
        return self.evaluations[0]

    @property
    def final(self) -> Results:
        """Results after the last step."""
        return self.evaluations[max(self.evaluations)]

    def loss_change(self, name: str, step: int | None = None) -> float:
        """Change of a set's loss against the base, in percent; positive is worse."""
        results = self.final if step is None else self.evaluations[step]
        return 100.0 * (results[name]["nll"] / self.base[name]["nll"] - 1.0)


@dataclass(frozen=True)
class Facts:
    """What the report states besides the runs' own numbers."""

    seed: int
    nearest_neighbour: float
    rows: Mapping[str, int]
    dropped: Mapping[str, int]
    assets: Sequence[Asset]
    python: str
    wall_seconds: Mapping[str, float] = field(default_factory=dict)


def read_arm(name: str, metrics: Path, *, domain_source: str, wall_seconds: float, base: Results | None = None) -> Arm:
    """Read a run's metrics.jsonl.

    Args:
        name: the arm's name in table and picture.
        metrics: the file.
        domain_source: name of the domain data in the recipe.
        wall_seconds: of the whole run.
        base: results of the base where the run did not measure it itself.

    Raises:
        ValueError: the file holds no evaluation of the base, or no training step.
    """
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    evaluations = {} if base is None else {0: base}
    evaluations |= {line["step"]: line["evaluation"] for line in lines if "evaluation" in line}
    steps = [line for line in lines if "sources" in line]
    if 0 not in evaluations or not steps:
        raise ValueError(
            f"{metrics}: {len(evaluations)} evaluations (of the steps {sorted(evaluations)}) and {len(steps)} training "
            "lines, expected an evaluation of step 0 and a finished run; run the demo again"
        )
    sources = steps[-1]["sources"]
    return Arm(
        name=name,
        evaluations=evaluations,
        shares={source: values["token_share"] for source, values in sources.items()},
        domain_tokens=int(sources[domain_source]["tokens"]),
        seconds=float(steps[-1]["seconds"]),
        wall_seconds=wall_seconds,
    )


def table_rows(arms: Sequence[Arm]) -> list[list[str]]:
    """Cells of the result table: a row per set; base, then every arm with its change."""
    rows = []
    for name, base in arms[0].base.items():
        if base["kind"] == "loss":
            cells = [f"{base['nll']:.3f}"]
            cells += [f"{arm.final[name]['nll']:.3f} ({arm.loss_change(name):+.1f} %)" for arm in arms]
            rows.append([f"{name}: loss", *cells])
        else:
            cells = [f"{100 * base['accuracy']:.1f} %"]
            cells += [f"{100 * arm.final[name]['accuracy']:.1f} %" for arm in arms]
            rows.append([f"{name}: accuracy", *cells])
    return rows


def verdicts(domain_only: Arm, mixed: Arm) -> list[tuple[str, bool]]:
    """The three things the demo is to show, each with its numbers, and whether they hold."""
    accuracy = mixed.final[DOMAIN_SET]["accuracy"]
    kept, lost = mixed.loss_change(UNSEEN_SET), domain_only.loss_change(UNSEEN_SET)
    return [
        (
            f"mixed learns the domain: {100 * accuracy:.1f} % (at least {100 * MIN_ACCURACY:.0f} %)",
            accuracy >= MIN_ACCURACY,
        ),
        (
            f"mixed keeps general ability: {UNSEEN_SET} loss {kept:+.2f} % (at most {MAX_UNSEEN_RISE:+.0f} %)",
            kept <= MAX_UNSEEN_RISE,
        ),
        (
            f"domain only loses it: {UNSEEN_SET} loss {lost:+.2f} % (at least {MIN_RATIO:.0f} times as much)",
            lost > 0 and lost >= MIN_RATIO * kept,
        ),
    ]


def print_table(arms: Sequence[Arm], facts: Facts, console: Console) -> None:
    """Print the result table and the verdicts."""
    table = Table(title=f"SmolLM2-135M on ICD-10-CM chapters, seed {facts.seed}", title_justify="left")
    for number, column in enumerate(["held-out set", "base", *(arm.name for arm in arms)]):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    for row in table_rows(arms):
        table.add_row(*row)
    console.print(table)
    console.print(
        f"1-nearest-neighbour baseline on {DOMAIN_SET}: {100 * facts.nearest_neighbour:.1f} %", highlight=False
    )
    for text, holds in verdicts(*arms):
        console.print(f"{'yes' if holds else 'NO '}  {text}", style="green" if holds else "bold red", highlight=False)


def write_report(arms: Sequence[Arm], facts: Facts, path: Path) -> None:
    """Write report.md; it refers to retention.png next to it."""
    domain_only, mixed = arms
    sizes = ", ".join(f"{name} {count}" for name, count in facts.rows.items())
    dropped = ", ".join(f"{name} {count}" for name, count in facts.dropped.items() if count) or "none"
    lines = [
        "# A domain learned, general ability kept",
        "",
        "SmolLM2-135M-Instruct learns which chapter of ICD-10-CM a diagnosis belongs to, twice with LoRA and the same "
        "number of domain tokens: once on domain data only, once mixed with general data. "
        f"Seed {facts.seed}. Losses are mean negative log-likelihoods per token (lower is better); "
        "accuracy is exact match of the greedy answer.",
        "",
        *_markdown_table(["held-out set", "base", *(arm.name for arm in arms)], table_rows(arms)),
        "",
        f"A 1-nearest-neighbour baseline (character n-grams) scores {100 * facts.nearest_neighbour:.1f} % on the same "
        f"{DOMAIN_SET} split.",
        "",
        *[f"- {'yes' if holds else '**no**'}: {text}" for text, holds in verdicts(domain_only, mixed)],
        "",
        "![domain accuracy and general loss of both arms over the steps](retention.png)",
        "",
        "## How to read this",
        "",
        f"- `{UNSEEN_SET}` is evaluation only: neither arm trains on anything from that source. The other general sets "
        "are held-out parts of sets that the mixed arm trains on.",
        "- The base weights are a 4-bit checkpoint (GGUF, Q4_1) expanded to bfloat16, not the original weights.",
        "- The sets `instructions`, `knowledge` and `writing` are rehearsal data: prompts composed for this demo, "
        "answers sampled from the base model itself before training. Their loss tells how far a model has moved.",
        "- Both arms use the same learning rate, steps, adapters and domain rows; only the mix differs. Learning rate "
        "and weight of the domain answers were chosen in trials of the mixed arm, some of them on this domain split: "
        "read small differences in accuracy with that in mind (160 items: one standard error is about 2 points).",
        "- `prose` comes from the documentation inside the running Python and so depends on its version "
        f"(here {facts.python}).",
        "- Training and evaluation share no row and no word 8-gram; this is checked before every run. ICD is split by "
        f"three-character category. Training rows dropped for overlap: {dropped}.",
        "",
        "## Data",
        "",
        f"Rows: {sizes}.",
        "",
        *_markdown_table(
            ["realised share of tokens", *(arm.name for arm in arms)],
            [
                [source, *(f"{100 * arm.shares[source]:.1f} %" if source in arm.shares else "-" for arm in arms)]
                for source in mixed.shares
            ],
        ),
        "",
        f"Domain tokens: {domain_only.domain_tokens:,} (domain only), {mixed.domain_tokens:,} (mixed).",
        "",
        *_markdown_table(
            ["package", "file", "used for", "licence"],
            [[f"{a.package} {a.version}", f"`{a.member}`", a.used_for, a.licence] for a in facts.assets]
            + [
                ["reasoning-gym 0.1.25", "its generators", "general: maths and logic exercises", "Apache-2.0"],
                ["Python itself", "`pydoc_data/topics.py`", "general: prose", "PSF-2.0"],
            ],
        ),
        "",
        "## Wall times",
        "",
        *_markdown_table(
            ["part", "seconds"],
            [[name, f"{seconds:.0f}"] for name, seconds in facts.wall_seconds.items()]
            + [[f"{arm.name}: run, of it training", f"{arm.wall_seconds:.0f}, {arm.seconds:.0f}"] for arm in arms],
        ),
        "",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(lines))


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *("---:" for _ in header[1:])] if all(_is_number(row[-1]) for row in rows) else ["---"] * len(header)
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]


def _is_number(cell: str) -> bool:
    return cell[:1] in "+-0123456789"
