"""The loop: normalisation over the step, metrics per source, its files, what stops it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from forge_core.data import Tokenizer
from forge_core.data.pack import assemble_pack
from forge_core.kernels import gradient_norm, weighted_linear_cross_entropy
from forge_core.model import load_adapter, load_model
from forge_core.recipe import Recipe
from forge_core.train import NonFiniteError, ResumeError, train
from forge_core.train.checkpoint import build_model, checkpoint_paths
from forge_core.train.metrics import MetricsLog, read_lines
from forge_core.train.sources import batch_stream, prepare_sources
from tests.data.tiny import questions, write_jsonl

from .tiny import recipe, settings, write_world

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(folder / "metrics.jsonl") if "loss" in line]


def test_a_step_is_one_batch_whatever_its_packs(world: Path, tmp_path: Path) -> None:
    options = recipe(world, tmp_path, max_steps=1, warmup_steps=0, max_grad_norm=1e9)
    train(options, console=QUIET)
    sources = prepare_sources(options, Tokenizer.from_pretrained(options.model.path))
    packs = batch_stream(options, sources).next_sample_ids()
    assert len(packs) == 3
    stores = [source.store for source in sources]
    whole = assemble_pack([sample for pack in packs for sample in pack], stores, 3 * 96)
    model = build_model(options, torch.device("cpu"))
    hidden = model(whole.input_ids, whole.cu_seqlens)
    loss = weighted_linear_cross_entropy(hidden, model.lm_head_weight, whole.targets, whole.token_weights).loss
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    line = steps_of(tmp_path)[0]
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_the_loss_is_told_how_many_rows_count(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: float
) -> None:
    told = []

    def loss(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, *, counted_rows: int, **rest: Any) -> Any:
        told.append((counted_rows, int(((targets != -100) & (weights != 0)).sum()), len(targets)))
        return weighted_linear_cross_entropy(hidden, head, targets, weights, counted_rows=counted_rows, **rest)

    monkeypatch.setattr("forge_core.train.loop.weighted_linear_cross_entropy", loss)
    rows = [{**row, "weight": weight if i % 2 else 1.0} for i, row in enumerate(questions(40))]
    content = settings(world, tmp_path / "run", max_steps=1)
    content["data"]["customer"] = [{"name": "domain", "path": str(write_jsonl(tmp_path / "weighted.jsonl", rows))}]
    content["evaluation"] = {"sets": []}
    train(Recipe.model_validate(content), console=QUIET)
    assert len(told) == 3
    for counted, expected, tokens in told:
        assert counted == expected
        assert 0 < counted < tokens


def test_metrics_and_results(world: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, list[str]]] = []
    result = train(
        recipe(world, tmp_path),
        console=QUIET,
        on_evaluation=lambda step, results: seen.append((step, list(results))),
    )
    assert seen == [(step, ["answers", "prose-test"]) for step in (0, 3, 6)]
    lines = steps_of(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[0]["lr"] == pytest.approx(1e-3)
    assert lines[1]["lr"] == pytest.approx(2e-3)
    assert lines[5]["lr"] == pytest.approx(1e-4)
    first, last = lines[0], lines[-1]
    assert last["sources"]["domain"]["loss"] < first["sources"]["domain"]["loss"]
    for line in lines:
        assert line["tokens"] == sum(source["tokens"] for source in line["sources"].values())
        assert line["tokens_per_second"] > 0
    shares = {name: source["loss_token_share"] for name, source in last["sources"].items()}
    assert shares["domain"] == pytest.approx(0.6, abs=40 / last["loss_tokens"] + 0.1)
    assert (result.steps, result.tokens, result.loss) == (6, last["tokens"], last["loss"])
    assert result.summary[-1].startswith("General ability")
    predictions = [json.loads(line) for line in (tmp_path / "predictions/step-00000006/answers.jsonl").open()]
    assert len(predictions) == 6
    assert predictions[0]["line"] == 1
    tuned = load_model(world / "base", dtype=torch.float32)
    load_adapter(tuned, result.result)


def test_loss_per_source_adds_up(world: Path, tmp_path: Path) -> None:
    train(recipe(world, tmp_path, max_steps=2, log_steps=2), console=QUIET)
    (line,) = steps_of(tmp_path)
    parts = [(source["loss_tokens"], source["loss"]) for source in line["sources"].values()]
    assert all(loss is not None for _, loss in parts)
    mean = sum(tokens * loss for tokens, loss in parts) / sum(tokens for tokens, _ in parts)
    assert line["loss"] == pytest.approx(mean, rel=1e-6)
    assert line["step"] == 2


def test_full_rank_in_bfloat16_writes_a_model(world: Path, tmp_path: Path) -> None:
    content = settings(world, tmp_path, learning_rate=1e-3, max_steps=8, save_steps=8)
    content["lora"] = None
    content["model"]["dtype"] = "bfloat16"
    result = train(Recipe.model_validate(content), console=QUIET)
    assert result.result == tmp_path / "model"
    lines = steps_of(tmp_path)
    assert lines[-1]["loss"] < lines[0]["loss"]
    tuned, base = load_model(result.result), load_model(world / "base")
    assert not torch.equal(tuned.lm_head_weight, base.lm_head_weight)
    assert (result.result / "tokenizer.json").is_file()


def test_activation_checkpointing_changes_nothing(world: Path, tmp_path: Path) -> None:
    content = settings(world, tmp_path / "plain", max_steps=2)
    content["lora"]["dropout"] = 0.2
    train(Recipe.model_validate(content), console=QUIET)
    content["output_dir"] = str(tmp_path / "recomputed")
    content["model"]["activation_checkpointing"] = True
    train(Recipe.model_validate(content), console=QUIET)
    plain, recomputed = steps_of(tmp_path / "plain"), steps_of(tmp_path / "recomputed")
    assert [(a["loss"], a["grad_norm"]) for a in plain] == [(b["loss"], b["grad_norm"]) for b in recomputed]


def test_a_rehearsal_takes_the_first_steps_of_the_run(world: Path, tmp_path: Path) -> None:
    train(recipe(world, tmp_path / "run", warmup_steps=4), console=QUIET)
    train(recipe(world, tmp_path / "rehearsal", warmup_steps=4, max_steps=2), console=QUIET)
    run, rehearsal = steps_of(tmp_path / "run"), steps_of(tmp_path / "rehearsal")
    assert [line["loss"] for line in rehearsal] == [line["loss"] for line in run[:2]]


def test_only_the_newest_checkpoints_stay(world: Path, tmp_path: Path) -> None:
    train(recipe(world, tmp_path, save_steps=1, keep_checkpoints=2), console=QUIET)
    assert [path.name for path in checkpoint_paths(tmp_path)] == ["step-00000005", "step-00000006"]


def test_a_finished_run_is_not_overwritten_by_chance(world: Path, tmp_path: Path) -> None:
    options = recipe(world, tmp_path, max_steps=2)
    train(options, console=QUIET)
    with pytest.raises(ResumeError, match="holds a run with checkpoints"):
        train(options, console=QUIET)
    (tmp_path / "notes.txt").write_text("mine")
    before = steps_of(tmp_path)
    train(options, overwrite=True, console=QUIET)
    assert [line["loss"] for line in steps_of(tmp_path)] == [line["loss"] for line in before]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_one_process_per_folder(world: Path, tmp_path: Path) -> None:
    options = recipe(world, tmp_path, max_steps=1)

    def train_again(line: dict[str, Any]) -> None:
        train(options, resume=True, console=QUIET)

    with pytest.raises(ResumeError, match="another process trains in"):
        train(options, console=QUIET, on_step=train_again)


def test_a_loss_that_explodes_stops_the_run_and_names_the_samples(world: Path, tmp_path: Path) -> None:
    content = settings(world, tmp_path, learning_rate=1e30, warmup_steps=0, save_steps=1, log_steps=10)
    content["evaluation"] = {"at_start": False}
    with pytest.raises(NonFiniteError, match=r"step 2: the loss is not finite") as caught:
        train(Recipe.model_validate(content), console=QUIET)
    assert ".jsonl:" in str(caught.value)
    assert [path.name for path in checkpoint_paths(tmp_path)] == ["step-00000001"]


def test_a_gradient_that_is_not_finite_stops_the_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = gradient_norm
    monkeypatch.setattr("forge_core.train.optimizer.gradient_norm", lambda gradients: real(gradients) * float("nan"))
    with pytest.raises(NonFiniteError, match=r"step 1: the gradient \(norm nan\) is not finite.*domain.jsonl:\d"):
        train(recipe(world, tmp_path), console=QUIET)
    assert checkpoint_paths(tmp_path) == []


def test_progress_shows_what_a_user_wants_to_know(world: Path, tmp_path: Path) -> None:
    for terminal in (False, True):
        console = Console(record=True, force_terminal=terminal, width=160, file=(tmp_path / "screen").open("w"))
        train(recipe(world, tmp_path, max_steps=3), overwrite=True, console=console)
        text = console.export_text()
        for part in ("step 3/3", "tokens/s", "domain ", "prose-test: loss", "General ability", "Trained 3 steps"):
            assert part in text
        assert ("ETA" in text) != terminal  # the bar shows the time left as a clock


def test_metrics_drop_what_a_kill_cut_short(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    log = MetricsLog(tmp_path, after_step=1)
    log.write({"step": 2, "loss": float("nan")})
    log.close()
    assert read_lines(file) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": None}]
    file.write_text('{"step": 1}\nbroken\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: not valid JSON"):
        read_lines(file)


def test_a_missing_cuda_device_is_an_error(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    content = settings(world, tmp_path)
    content["model"]["device"] = "cuda"
    with pytest.raises(ValueError, match=r"model.device: got cuda"):
        train(Recipe.model_validate(content), console=QUIET)
