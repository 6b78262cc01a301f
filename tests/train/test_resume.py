"""Interrupted runs go on bit for bit, or refuse and say why."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.torch import load_file

from forge_core.recipe import Recipe
from forge_core.train import ResumeError, train
from forge_core.train.checkpoint import checkpoint_paths
from forge_core.train.metrics import read_lines

from .tiny import settings, write_model, write_recipe, write_world

QUIET = Console(quiet=True)
TIMES = {"seconds", "tokens_per_second"}


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def variant(world: Path, name: str, output_dir: Path, **training: Any) -> dict[str, Any]:
    """Recipes whose state differs in kind: adapters with dropout, or bfloat16 weights with float32 masters."""
    content = settings(world, output_dir, **training)
    if name == "lora":
        content["lora"]["dropout"] = 0.1
    else:
        content["lora"] = None
        content["model"]["dtype"] = name
    return content


def outcome(folder: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Metrics without clock times, and the bytes of what was trained."""
    lines = [{k: v for k, v in line.items() if k not in TIMES} for line in read_lines(folder / "metrics.jsonl")]
    weights = sorted(folder.glob("adapter/*.safetensors")) + sorted(folder.glob("model/*.safetensors"))
    assert len(weights) == 1
    return lines, {
        name: t.contiguous().view(-1).numpy(force=True).tobytes()
        if t.dtype.itemsize == 4
        else t.float().numpy(force=True).tobytes()
        for name, t in load_file(weights[0]).items()
    }


@pytest.fixture(scope="module")
def straight(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    outcomes = {}
    for name in ("lora", "float32", "bfloat16"):
        folder = tmp_path_factory.mktemp(name)
        train(Recipe.model_validate(variant(world, name, folder)), console=QUIET)
        outcomes[name] = outcome(folder)
    return outcomes


@pytest.mark.parametrize("name", ["lora", "float32", "bfloat16"])
@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5, 6])
def test_stopped_at_any_step(world: Path, straight: dict[str, Any], tmp_path: Path, name: str, stop: int) -> None:
    options = Recipe.model_validate(variant(world, name, tmp_path))

    def interrupt(line: dict[str, Any]) -> None:
        if line["step"] == stop:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(options, console=QUIET, on_step=interrupt)
    train(options, resume=True, console=QUIET)
    assert outcome(tmp_path) == straight[name]


def test_stopped_at_every_step_in_turn(world: Path, straight: dict[str, Any], tmp_path: Path) -> None:
    options = Recipe.model_validate(variant(world, "lora", tmp_path, save_steps=1))

    def interrupt(line: dict[str, Any]) -> None:
        raise Interrupted

    for step in range(1, 7):
        with pytest.raises(Interrupted):
            train(options, resume=True, console=QUIET, on_step=interrupt)
        assert checkpoint_paths(tmp_path)[-1].name == f"step-{step:08d}"
    train(options, resume=True, console=QUIET)
    assert outcome(tmp_path) == straight["lora"]


@pytest.mark.parametrize("log_steps", [4, 10])
def test_log_windows_do_not_depend_on_the_interruption(world: Path, tmp_path: Path, log_steps: int) -> None:
    folders = [tmp_path / "straight", tmp_path / "stopped"]
    options = [Recipe.model_validate(variant(world, "lora", folder, log_steps=log_steps)) for folder in folders]
    train(options[0], console=QUIET)

    def interrupt(line: dict[str, Any]) -> None:
        if line["step"] == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(options[1], console=QUIET, on_step=interrupt)
    assert [path.name for path in checkpoint_paths(folders[1])] == ["step-00000002"]
    train(options[1], resume=True, console=QUIET)
    assert outcome(folders[1]) == outcome(folders[0])


KILL_AT_STEP = """
import os, signal
from forge_core.recipe import load_recipe
from forge_core.train import train
def kill(line):
    if line["step"] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
train(load_recipe({recipe!r}), on_step=kill)
"""
KILL_IN_CHECKPOINT = """
import os, signal
from forge_core.recipe import load_recipe
from forge_core.train import checkpoint, train
save = checkpoint.save_file
def kill(tensors, path):
    save(tensors, path)
    if "00000004" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save_file = kill
train(load_recipe({recipe!r}))
"""


@pytest.mark.parametrize("program", [KILL_AT_STEP, KILL_IN_CHECKPOINT], ids=["between checkpoints", "while saving"])
def test_killed(world: Path, straight: dict[str, Any], tmp_path: Path, program: str) -> None:
    folder = tmp_path / "out"
    file = write_recipe(tmp_path / "recipe.yaml", variant(world, "lora", folder))
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", program.format(recipe=str(file))], env=environment, capture_output=True, check=False
    )
    assert done.returncode == -9, done.stderr.decode()
    assert [path.name for path in checkpoint_paths(folder)] == ["step-00000002"]
    train(Recipe.model_validate(variant(world, "lora", folder)), resume=True, console=QUIET)
    assert outcome(folder) == straight["lora"]
    assert not [entry for entry in folder.rglob("*") if ".tmp-" in entry.name]


def test_nothing_saved_yet_starts_anew(world: Path, straight: dict[str, Any], tmp_path: Path) -> None:
    options = Recipe.model_validate(variant(world, "lora", tmp_path))

    def interrupt(line: dict[str, Any]) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        train(options, console=QUIET, on_step=interrupt)
    train(options, resume=True, console=QUIET)
    assert outcome(tmp_path) == straight["lora"]


@pytest.fixture(scope="module")
def begun(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("begun")
    train(Recipe.model_validate(settings(world, folder, max_steps=2)), console=QUIET)
    return folder


def resume_error(content: dict[str, Any], begun: Path, folder: Path) -> str:
    shutil.copytree(begun, folder)
    with pytest.raises(ResumeError) as caught:
        train(Recipe.model_validate({**content, "output_dir": str(folder)}), resume=True, console=QUIET)
    return str(caught.value)


@pytest.mark.parametrize(
    ("section", "key", "value", "reason"),
    [
        (None, "seed", 4, "order differs: seed was 3, is 4"),
        ("training", "packs_per_step", 4, "order differs: packs_per_step was 3, is 4"),
        ("data", "customer_percent", 50, "order differs: shares was [0.6, 0.4], is [0.5, 0.5]"),
        ("data", "share_of", "tokens", 'order differs: share_of was "loss_tokens", is "tokens"'),
        ("data", "max_length", 128, "order differs: max_length was 96, is 128"),
        ("data", "sanitize", False, "data differs: domain was"),
        ("model", "dtype", "bfloat16", 'architecture differs: dtype was "float32", is "bfloat16"'),
        ("lora", "rank", 8, "architecture differs: lora.rank was 4, is 8"),
        (None, "lora", None, "architecture differs: lora was"),
    ],
)
def test_a_resume_that_would_diverge_is_refused(
    world: Path, begun: Path, tmp_path: Path, section: str | None, key: str, value: Any, reason: str
) -> None:
    content = settings(world, tmp_path)
    (content[section] if section else content)[key] = value
    message = resume_error(content, begun, tmp_path / "out")
    assert reason in message
    assert "another output_dir" in message


def test_other_data_is_refused(world: Path, begun: Path, tmp_path: Path) -> None:
    content = settings(world, tmp_path)
    changed = tmp_path / "domain.jsonl"
    changed.write_text((world / "domain.jsonl").read_text().replace("fox", "dog", 1))
    content["data"]["customer"][0]["path"] = str(changed)
    assert "data differs: domain was" in resume_error(content, begun, tmp_path / "out")


def test_another_order_of_the_same_data_is_refused(
    world: Path, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(begun, tmp_path / "out")
    monkeypatch.setattr("forge_core.data.mix.random_permutation", lambda count, key: np.arange(count))
    with pytest.raises(ValueError, match="other samples"):
        train(Recipe.model_validate(settings(world, tmp_path / "out")), resume=True, console=QUIET)


def test_another_architecture_or_base_is_refused(world: Path, begun: Path, tmp_path: Path) -> None:
    content = settings(world, tmp_path)
    content["model"]["path"] = str(write_model(tmp_path / "wide", intermediate_size=64))
    message = resume_error(content, begun, tmp_path / "out")
    assert "architecture differs: intermediate_size was 48, is 64" in message
    content["model"]["path"] = str(write_model(tmp_path / "other", seed=1))
    assert "architecture differs: base_weights was" in resume_error(content, begun, tmp_path / "again")


def test_other_steps_and_rates_are_allowed_and_said(world: Path, begun: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(begun, folder)
    console = Console(record=True, width=200, file=(tmp_path / "screen").open("w"))
    content = settings(world, folder, max_steps=3, learning_rate=1e-3)
    assert train(Recipe.model_validate(content), resume=True, console=console).steps == 3
    text = console.export_text()
    assert "Changed since the run began: max_steps was 2, is 3." in text
    assert "Changed since the run began: learning_rate was 0.002, is 0.001." in text


def test_a_damaged_checkpoint_is_named(world: Path, begun: Path, tmp_path: Path) -> None:
    content = settings(world, tmp_path)
    damaged = tmp_path / "damaged"
    shutil.copytree(begun, damaged)
    file = checkpoint_paths(damaged)[-1] / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    assert "optimizer.safetensors: got" in resume_error(content, damaged, tmp_path / "out")
    state = checkpoint_paths(damaged)[-1] / "trainer_state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "format": 0}))
    assert "format 0, expected 1" in resume_error(content, damaged, tmp_path / "again")
