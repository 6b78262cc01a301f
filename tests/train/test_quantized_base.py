"""Adapters on a 4-bit base, from the recipe: training, resume, evaluation, export, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from forge_core.evaluate import compare_with_base
from forge_core.model import dequantize_model, load_adapter, load_model, merge_lora
from forge_core.recipe import Recipe, RecipeError, load_recipe
from forge_core.train import ResumeError, train
from forge_core.train.check import check
from forge_core.train.checkpoint import build_model
from forge_core.train.export import export
from forge_core.train.metrics import read_lines

from .tiny import settings, write_model, write_recipe, write_world

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_world(tmp_path_factory.mktemp("world"))
    write_model(folder / "base", hidden_size=64, intermediate_size=128)  # rows of whole blocks
    return folder


def content(world: Path, output_dir: Path, quantize: str | None = "nf4", **training: Any) -> dict[str, Any]:
    made = settings(world, output_dir, **training)
    made["model"] |= {"dtype": "bfloat16", "quantize": quantize}
    return made


def recipe(*arguments: Any, **options: Any) -> Recipe:
    return Recipe.model_validate(content(*arguments, **options))


@pytest.fixture(scope="module")
def run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    options = recipe(world, tmp_path_factory.mktemp("run"), max_steps=12, learning_rate=1e-2)
    train(options, console=QUIET)
    return options


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_lines(folder / "metrics.jsonl") if "loss" in line]


def test_the_loss_falls(run: Recipe) -> None:
    values = losses(run.output_dir)
    assert len(values) == 12 and sum(values[-3:]) < 0.9 * sum(values[:3])
    assert check(run).trained_parameters > 0
    model = build_model(run, torch.device("cpu"))
    assert model.get_submodule("model.layers.0.mlp.up_proj").weight.dtype == torch.uint8


def test_trains_as_the_dequantised_base_does(run: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from forge_core.train import checkpoint

    def dense(*arguments: Any, **options: Any) -> Any:
        model = load_model(*arguments, **options)
        dequantize_model(model)
        return model

    monkeypatch.setattr(checkpoint, "load_model", dense)
    options = run.model_copy(update={"output_dir": tmp_path})
    train(options, console=QUIET)
    assert losses(tmp_path) == losses(run.output_dir)
    ours, theirs = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (run.output_dir, tmp_path))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


def test_resumes_bit_for_bit_on_the_same_format_only(run: Recipe, world: Path, tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(line: dict[str, Any]) -> None:
        if line["step"] == 5:
            raise Interrupted

    options = run.model_copy(update={"output_dir": tmp_path})
    with pytest.raises(Interrupted):
        train(options, console=QUIET, on_step=interrupt)
    with pytest.raises(ResumeError, match=r'quantize was "nf4", is "fp4"'):
        train(recipe(world, tmp_path, "fp4", max_steps=12, learning_rate=1e-2), resume=True, console=QUIET)
    train(options, resume=True, console=QUIET)
    assert losses(tmp_path) == losses(run.output_dir)
    ours, theirs = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (run.output_dir, tmp_path))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


def test_evaluates_the_quantised_base_and_its_adapter(run: Recipe) -> None:
    results = compare_with_base(run, adapter=run.output_dir / "adapter")
    assert results["base"].keys() == results["tuned"].keys()
    lines = [line for line in read_lines(run.output_dir / "metrics.jsonl") if "evaluation" in line]
    for measured, line in ((results["base"], lines[0]), (results["tuned"], lines[-1])):
        for name, result in line["evaluation"].items():
            for key, value in result.items():
                if isinstance(value, float):
                    assert measured[name][key] == value


def test_exports_the_adapter_and_the_merged_model(run: Recipe, tmp_path: Path) -> None:
    export(run, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["peft_type"] == "LORA"
    export(run, tmp_path / "merged", merge=True)
    expected = load_model(run.model.path, quantize="nf4")
    dequantize_model(expected)
    load_adapter(expected, run.output_dir / "adapter")
    merge_lora(expected)
    merged = load_model(tmp_path / "merged")
    for name, weight in merged.named_parameters():
        assert torch.equal(weight, expected.get_parameter(name)), name


def test_what_is_refused(world: Path, tmp_path: Path) -> None:
    full = content(world, tmp_path / "out") | {"lora": None}
    file = write_recipe(tmp_path / "recipe.yaml", full)
    with pytest.raises(RecipeError, match=r"recipe\.yaml:\d+: lora: got null with model\.quantize nf4"):
        load_recipe(file)
    write_model(tmp_path / "narrow")
    narrow = content(world, tmp_path / "out")
    narrow["model"]["path"] = str(tmp_path / "narrow")
    with pytest.raises(ValueError, match=r"rows of 32, no multiple of the block of 64"):
        check(Recipe.model_validate(narrow))
    assert "quantize" not in recipe(world, tmp_path, None).determining()  # digests stay what they were
