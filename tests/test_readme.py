"""What the README shows must run."""

import re
from pathlib import Path

import yaml

from forge_core.recipe import Recipe

README = (Path(__file__).parents[1] / "README.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_kernel_example_runs() -> None:
    names: dict = {}
    exec(_blocks("python")[0], names)
    assert names["result"].loss.isfinite() and names["a"].grad is not None and names["x"].grad is not None
    assert names["logprob"].shape == (names["tokens"],)


def test_recipe_example_is_valid(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(yaml.safe_load(_blocks("yaml")[0]), context={"base": tmp_path})
    assert recipe.training.max_steps == 200 and recipe.data.customer_percent == 50


def test_make_targets_exist() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(_blocks("bash")), re.MULTILINE):
        assert f"\n{target}:" in makefile
