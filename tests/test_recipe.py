"""The recipe: defaults per technique, errors that say where and what to do, overrides, the reference page."""

from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml

from forge_core.recipe import Recipe, RecipeError, load_recipe, save_recipe
from forge_core.recipe_reference import render_reference

MINIMAL: dict[str, Any] = {
    "technique": "sft",
    "model": {"path": "base"},
    "output_dir": "out",
    "data": {"customer": [{"name": "icd", "path": "icd.jsonl"}]},
}
GENERAL = [
    {"category": "prose", "path": "p.jsonl", "percent": 40},
    {"category": "qa", "path": "q.jsonl", "percent": 60},
]


def write(folder: Path, content: dict[str, Any] | str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return file


def error_of(folder: Path, content: dict[str, Any] | str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, content), overrides)
    return str(caught.value).replace(str(folder / "recipe.yaml"), "FILE")


@pytest.mark.parametrize(
    ("technique", "lora", "rate", "packs", "eps"),
    [("sft", {}, 1e-5, 32, 1e-8), ("sft", None, 5e-6, 32, 1e-8), ("cpt", {}, 1e-5, 256, 1e-6)],
)
def test_defaults_follow_the_technique(technique: str, lora: Any, rate: float, packs: int, eps: float) -> None:
    training = Recipe.model_validate({**MINIMAL, "technique": technique, "lora": lora}).training
    assert (training.learning_rate, training.packs_per_step, training.eps) == (rate, packs, eps)
    assert (training.beta1, training.beta2, training.min_lr, training.weight_decay) == (0.9, 0.95, 1e-6, 0)


@pytest.mark.parametrize(("steps", "warmup"), [(312, 47), (624, 94), (100, 15), (5, 1), (1, 0)])
def test_warmup_is_15_percent_of_the_steps(steps: int, warmup: int) -> None:
    recipe = Recipe.model_validate({**MINIMAL, "training": {"max_steps": steps}})
    assert recipe.training.warmup_steps == warmup
    assert recipe.training.save_steps == recipe.evaluation.every == steps


def test_given_options_win_and_are_known_as_chosen() -> None:
    recipe = Recipe.model_validate({**MINIMAL, "training": {"learning_rate": 3e-7, "warmup_steps": None}})
    assert recipe.training.learning_rate == recipe.training.min_lr == 3e-7
    assert recipe.chose("learning_rate")
    assert not recipe.chose("warmup_steps")


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        Recipe.model_validate(MINIMAL).seed = 1


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL), ["data.customer.0.path=../x.jsonl"])
    assert recipe.model.path == tmp_path / "base"
    assert recipe.data.customer[0].path == tmp_path.parent / "x.jsonl"


def test_overrides(tmp_path: Path) -> None:
    file = write(tmp_path, MINIMAL)
    recipe = load_recipe(file, ["training.max_steps=5", "lora.rank=8", "lora.target_modules=[q_proj]", "seed=7"])
    assert (recipe.training.max_steps, recipe.training.warmup_steps, recipe.seed) == (5, 1, 7)
    assert recipe.lora is not None
    assert (recipe.lora.rank, recipe.lora.target_modules) == (8, ("q_proj",))
    assert load_recipe(file, ["lora=null"]).lora is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"max_step": 3}}, "FILE:10: training.max_step: unknown key; did you mean 'training.max_steps'?"),
        ({"learning_rate": 1}, "FILE:9: learning_rate: unknown key here; did you mean 'training.learning_rate'?"),
        ({"zzz": 1}, "FILE:9: zzz: unknown key; valid here: data, evaluation, lora"),
        ({"lora": {"rank": 0}}, "FILE:10: lora.rank: got 0; input should be greater than or equal to 1"),
        ({"lora": {"target_modules": 3}}, "FILE:10: lora.target_modules: got 3"),
        ({"technique": "dpo"}, "FILE:1: technique: got 'dpo'; input should be 'sft' or 'cpt'"),
        ({"training": {"max_steps": "many"}}, "FILE:10: training.max_steps: got 'many'"),
        ({"training": {"min_lr": 1}}, "FILE:10: training.min_lr: got 1, above learning_rate 1e-05"),
        ({"training": [1]}, "FILE:9: training: got [1]; input should be a valid dictionary"),
        ({"evaluation": {"sets": [{"name": "a", "path": "a"}] * 2}}, "'a' stands twice"),
    ],
)
def test_errors_name_line_key_and_remedy(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    assert message in error_of(tmp_path, {**MINIMAL, **changes})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"customer": [{"name": "a", "pth": "x"}]},
            "data.customer.0.pth: unknown key; did you mean 'data.customer.0.path'",
        ),
        ({"customer": [{"name": "a"}]}, "data.customer.0.path: this key is required"),
        ({"customer": []}, "no source for customer_percent 100"),
        ({"general": GENERAL}, "customer_percent: must be given where general data is listed"),
        (
            {"general": GENERAL[:1], "customer_percent": 50},
            "data.general: the percents sum to 40 (prose 40), expected 100",
        ),
        ({"customer_percent": 50}, "customer_percent: got 50 without general data"),
        ({"general": [*GENERAL[:1], {**GENERAL[1], "category": "icd"}], "customer_percent": 5}, "'icd' stands twice"),
        ({"customer": [{"name": "a", "path": "a", "percent": 50}, {"name": "b", "path": "b"}]}, "[50.0, None]"),
    ],
)
def test_data_errors(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    assert message in error_of(tmp_path, {**MINIMAL, "data": {**MINIMAL["data"], **data}})


def test_several_errors_are_told_at_once(tmp_path: Path) -> None:
    lines = error_of(tmp_path, {**MINIMAL, "sed": 1, "lora": {"alpa": 2}}).splitlines()
    assert [line.split(": ")[1] for line in lines] == ["lora.alpa", "sed"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_step=5", "override 'training.max_step=5': training.max_step: unknown key; did you mean"),
        ("training.max_steps", "expected key=value"),
        ("=3", "expected key=value"),
        ("data.customer.1.path=x", "got '1' below data.customer, expected an index from 0 to 0"),
        ("seed.x=1", "seed is the value 0 and has no keys below it"),
    ],
)
def test_override_errors(tmp_path: Path, override: str, message: str) -> None:
    assert message in error_of(tmp_path, {**MINIMAL, "seed": 0}, override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nmodel: {path: a}\nseed: 2\n", "FILE:3: seed: this key already stands in line 1"),
        ("- 1\n", "got list, expected a mapping"),
        ("a: [1\n", "not valid YAML"),
        ("", "got NoneType, expected a mapping"),
    ],
)
def test_unreadable_files(tmp_path: Path, text: str, message: str) -> None:
    assert message in error_of(tmp_path, text)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        load_recipe(tmp_path / "none.yaml")


def test_saved_recipe_reads_back_the_same(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, {**MINIMAL, "data": {**MINIMAL["data"], "general": GENERAL, "customer_percent": 50}})
    )
    save_recipe(recipe, tmp_path / "resolved" / "recipe.yaml")
    assert load_recipe(tmp_path / "resolved" / "recipe.yaml").to_dict() == recipe.to_dict()


def test_digest_holds_what_determines_the_run() -> None:
    base = Recipe.model_validate(MINIMAL)
    for same in ({"training": {"log_steps": 7}}, {"output_dir": "elsewhere"}, {"evaluation": {"at_start": False}}):
        assert Recipe.model_validate({**MINIMAL, **same}).digest() == base.digest()
    for other in ({"training": {"beta2": 0.99}}, {"seed": 1}, {"lora": None}, {"technique": "cpt"}):
        assert Recipe.model_validate({**MINIMAL, **other}).digest() != base.digest()


def test_every_option_has_a_description() -> None:
    page = render_reference()
    for row in (line for line in page.splitlines() if line.startswith("| `")):
        assert row.split(" | ")[3].strip(), row


def test_the_reference_page_is_current() -> None:
    page = Path(__file__).parents[1] / "docs" / "recipe.md"
    assert page.read_text(encoding="utf-8") == render_reference(), (
        "run: python -m forge_core.recipe_reference > docs/recipe.md"
    )


def test_the_example_of_the_reference_page_is_valid(tmp_path: Path) -> None:
    example = render_reference().split("```yaml\n")[1].split("```")[0]
    assert load_recipe(write(tmp_path, example)).training.learning_rate == 5e-4
