"""Report, picture and recipes of the demo, from metrics made here."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from examples.demo import assets, report
from examples.demo.plot import plot_retention
from forge_core.recipe import load_recipe

RECIPES = Path(report.__file__).parent
FACTS = report.Facts(
    seed=7,
    nearest_neighbour=0.6625,
    rows={"icd-train": 1088, "icd-test": 160},
    dropped={"prose": 12, "civics": 0},
    assets=assets.ASSETS,
    python="3.11.7",
    wall_seconds={"fetch": 12.0, "all": 400.0},
)


def results(accuracy: float, nll: float) -> dict[str, Any]:
    return {
        "icd": {"kind": "exact_match", "role": "domain", "accuracy": accuracy, "correct": 1, "total": 2},
        "mmlu": {"kind": "loss", "role": "general", "nll": nll, "perplexity": 2.0, "tokens": 9},
    }


def write_metrics(path: Path, evaluations: dict[int, dict[str, Any]], shares: dict[str, float]) -> Path:
    """Metrics in the form the trainer writes them: training lines and evaluation lines, by step."""
    lines: list[dict[str, Any]] = []
    for step in sorted({*evaluations, 30, 60}):
        if step:
            sources = {
                name: {"loss": 1.0, "tokens": int(1500 * step * share), "token_share": share}
                for name, share in shares.items()
            }
            lines.append({"step": step, "loss": 1.0, "seconds": 2.0 * step, "sources": sources})
        if step in evaluations:
            lines.append({"step": step, "evaluation": evaluations[step]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def arms(tmp_path: Path) -> list[report.Arm]:
    first = write_metrics(
        tmp_path / "a.jsonl",
        {0: results(0.02, 2.4), 30: results(0.8, 2.6), 60: results(0.95, 2.76)},
        {"icd": 1.0},
    )
    second = write_metrics(
        tmp_path / "b.jsonl", {30: results(0.7, 2.41), 60: results(0.93, 2.412)}, {"icd": 0.5, "prose": 0.5}
    )
    domain_only = report.read_arm("domain only", first, domain_source="icd", wall_seconds=150)
    mixed = report.read_arm("mixed", second, domain_source="icd", wall_seconds=250, base=domain_only.base)
    return [domain_only, mixed]


def test_an_arm_is_read_from_its_metrics(arms: list[report.Arm]) -> None:
    domain_only, mixed = arms
    assert sorted(domain_only.evaluations) == sorted(mixed.evaluations) == [0, 30, 60]
    assert domain_only.loss_change("mmlu") == pytest.approx(15.0)
    assert mixed.loss_change("mmlu") == pytest.approx(0.5)
    assert mixed.loss_change("mmlu", 0) == 0.0
    assert (domain_only.domain_tokens, mixed.domain_tokens, mixed.seconds) == (90000, 45000, 120.0)


def test_metrics_without_a_base_are_an_error(tmp_path: Path) -> None:
    path = write_metrics(tmp_path / "m.jsonl", {60: results(0.9, 2.5)}, {"icd": 1.0})
    with pytest.raises(ValueError, match=r"m\.jsonl: 1 evaluations \(of the steps \[60\]\)"):
        report.read_arm("mixed", path, domain_source="icd", wall_seconds=1)


def test_the_verdicts_follow_the_numbers(arms: list[report.Arm]) -> None:
    assert [holds for _, holds in report.verdicts(*arms)] == [True, True, True]
    domain_only, mixed = arms
    assert [holds for _, holds in report.verdicts(mixed, domain_only)] == [True, False, False]


def test_the_report_states_numbers_sources_and_caveats(arms: list[report.Arm], tmp_path: Path) -> None:
    report.write_report(arms, FACTS, tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for needed in (
        "| icd: accuracy | 2.0 % | 95.0 % | 93.0 % |",
        "| mmlu: loss | 2.400 | 2.760 (+15.0 %) | 2.412 (+0.5 %) |",
        "Seed 7",
        "66.2 %",
        "4-bit checkpoint",
        "sampled from the base model itself",
        "dropped for overlap: prose 12.",
        "| prose | - | 50.0 % |",
        "Apache-2.0",
        "(retention.png)",
        "250, 120",
    ):
        assert needed in text, needed
    assert all(f"{asset.package} {asset.version}" in text for asset in assets.ASSETS)


def test_the_table_is_printed_with_baseline_and_verdicts(arms: list[report.Arm]) -> None:
    console = Console(record=True, width=120, force_terminal=False)
    report.print_table(arms, FACTS, console)
    text = console.export_text()
    assert "domain only" in text and "2.412 (+0.5 %)" in text and "66.2 %" in text
    assert text.count("yes") == 3


def test_the_picture_is_a_png(arms: list[report.Arm], tmp_path: Path) -> None:
    plot_retention(arms, 0.66, tmp_path / "deep" / "retention.png")
    data = (tmp_path / "deep" / "retention.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 10_000


def test_both_recipes_train_on_the_same_domain_tokens_and_measure_the_same() -> None:
    domain_only, mixed = (load_recipe(RECIPES / f"{name}.yaml") for name in ("domain_only", "mixed"))
    for recipe in (domain_only, mixed):
        assert recipe.data.share_of == "tokens"
    domain_tokens = [
        recipe.training.max_steps * recipe.training.packs_per_step * recipe.data.customer_percent
        for recipe in (domain_only, mixed)
    ]
    assert domain_only.data.max_length == mixed.data.max_length
    assert domain_tokens[0] == domain_tokens[1]
    assert domain_only.evaluation == mixed.evaluation
    assert domain_only.lora == mixed.lora
    assert domain_only.data.customer == mixed.data.customer
    assert "reasoning-instruction-following" in {source.category for source in mixed.data.general}
    trained = {source.path for source in (*mixed.data.customer, *mixed.data.general)}
    assert trained.isdisjoint({item.path for item in mixed.evaluation.sets})
    same = {"packs_per_step"}
    assert domain_only.training.model_dump(exclude=same) == mixed.training.model_dump(exclude=same)
