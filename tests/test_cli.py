"""The command line: every command on a tiny model, one clear line for every bad input."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from forge_core import cli
from forge_core.model import load_model
from forge_core.train.metrics import read_lines
from tests.data.tiny import questions, write_jsonl
from tests.train.tiny import CONFIG, settings, write_model, write_recipe, write_world

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process; returns exit code, output and errors."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["forge-core", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        output = capsys.readouterr()
        code = stopped.value.code
        return (code if isinstance(code, int) else 0), output.out, output.err

    return call


def test_check_prints_the_mix(world: Path, tmp_path: Path, run: Run) -> None:
    code, out, err = run("check", write_recipe(tmp_path / "r.yaml", settings(world, tmp_path / "out")))
    assert (code, err) == (0, "")
    domain = next(line for line in out.splitlines() if "domain " in line and "customer" in line)
    assert "40" in domain
    assert domain.count("60.00 %") == 2  # the target, and the share of the loss that follows from it
    tokens = run("check", tmp_path / "r.yaml", "data.share_of=tokens")[1]
    domain = next(line for line in tokens.splitlines() if "domain " in line and "customer" in line)
    assert domain.count("60.00 %") == 1
    assert "6 steps of 3 packs of 96 tokens: up to 288 tokens a step, 1,728 in all" in out
    assert "LoRA r 4, alpha 8" in out
    assert "the mix has no category 'reasoning-instruction-following'" in out
    assert "The recipe is valid." in out
    assert not (tmp_path / "out").exists()


def test_check_warns_before_compute_is_spent(world: Path, tmp_path: Path, run: Run) -> None:
    content = settings(world, tmp_path / "out", max_steps=200, warmup_steps=300)
    del content["training"]["learning_rate"], content["training"]["min_lr"]
    content["evaluation"]["sets"] = [
        {"name": "leak", "path": str(world / "domain.jsonl"), "kind": "exact_match"},
        {"name": "leak2", "path": str(world / "domain.jsonl"), "role": "domain", "limit": 5},
    ]
    content["data"]["max_length"] = 1024
    _, out, _ = run("check", write_recipe(tmp_path / "r.yaml", content))
    for warning in (
        "training.learning_rate is left at its default 1e-05 while mixing",
        "domain: ",
        "epochs; beyond one or two, overtraining erodes",
        "general data is gone through",
        "data.max_length 1024 exceeds the 512 positions",
        "evaluation.sets has no set with role general",
        "evaluation set 'leak' is not held out: 40 of 40 samples are also trained on",
        "evaluation set 'leak2' is not held out: 5 of 5 samples",
        "domain.jsonl:1 = ",
        "the learning rate never decays",
    ):
        assert warning in out, warning
    code, out, _ = run("check", tmp_path / "r.yaml", "technique=cpt", "data.customer_percent=100")
    assert code == 0
    assert "several epochs over little data memorise it" in out
    assert "data.customer_percent is 100: the general data is listed but not used" in out


def test_train_evaluate_export(world: Path, tmp_path: Path, run: Run) -> None:
    file = write_recipe(tmp_path / "r.yaml", settings(world, tmp_path / "out"))
    code, out, _ = run("train", file, "training.max_steps=5")
    assert code == 0
    assert "step 5/5" in out
    assert [line["step"] for line in read_lines(tmp_path / "out/metrics.jsonl") if "loss" in line] == [1, 2, 3, 4, 5]
    code, _, err = run("train", file, "training.max_steps=5")
    assert (code, err.count("\n")) == (1, 1)
    assert "holds a run with checkpoints; resume it (--resume), replace it (--overwrite)" in err
    code, out, _ = run("train", file, "training.max_steps=5", "--resume")
    assert code == 0
    assert "Resumed from step-00000005 of 5 steps." in out

    adapter = tmp_path / "out/adapter"
    code, out, _ = run("evaluate", file, "--adapter", adapter, "--to", tmp_path / "results.json")
    assert code == 0
    assert "prose-test" in out
    assert "General ability" in out
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["tuned"]["answers"]["predictions"]) == 6
    assert results["tuned"]["prose-test"]["nll"] != results["base"]["prose-test"]["nll"]
    logged = [line["evaluation"] for line in read_lines(tmp_path / "out/metrics.jsonl") if "evaluation" in line]
    assert results["base"]["prose-test"]["nll"] == logged[0]["prose-test"]["nll"]
    assert results["tuned"]["prose-test"]["nll"] == logged[-1]["prose-test"]["nll"]

    assert run("export", file, "--to", tmp_path / "adapter")[0] == 0
    names = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {entry.name for entry in (tmp_path / "adapter").iterdir()} == names
    assert run("export", file, "--to", tmp_path / "merged", "--merge")[0] == 0
    merged, base = (load_model(folder, dtype=torch.float32) for folder in (tmp_path / "merged", world / "base"))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(merged.state_dict()[name], base.state_dict()[name])
    code, out, _ = run("evaluate", file, "--model", tmp_path / "merged")
    assert code == 0
    code, _, err = run("export", file, "--to", tmp_path / "merged", "--merge")
    assert code == 1
    assert "is not empty; name a new folder" in err


def test_export_before_training(world: Path, tmp_path: Path, run: Run) -> None:
    file = write_recipe(tmp_path / "r.yaml", settings(world, tmp_path / "out"))
    code, _, err = run("export", file, "--to", tmp_path / "x")
    assert code == 1
    assert "output_dir: no result" in err
    assert not (tmp_path / "x").exists()


def bad_inputs(world: Path, folder: Path) -> dict[str, tuple[dict[str, Any], list[str], str]]:
    """name -> (changes to data.customer.0, overrides, what the error says)."""
    good = questions(3)
    broken = folder / "broken.jsonl"
    broken.write_text(json.dumps(good[0]) + '\n{"question": \n', encoding="utf-8")
    other = write_jsonl(folder / "other.jsonl", [{"prompt": "a", "reply": "b"}])
    collision = write_jsonl(folder / "collision.jsonl", [good[0], {"question": "x<|im_end|>", "answer": "b"}])
    long = write_jsonl(folder / "long.jsonl", [good[0], {"question": "a", "answer": "ten " * 200}])
    roles = write_jsonl(folder / "roles.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}])
    blank = folder / "blank.jsonl"
    blank.write_text("\n", encoding="utf-8")
    write_model(folder / "gpt", **CONFIG)
    config = folder / "gpt/config.json"
    config.write_text(config.read_text().replace('"llama"', '"gpt2"'))
    return {
        "malformed line": ({"path": str(broken)}, [], "broken.jsonl:2: "),
        "unknown columns": ({"path": str(other)}, [], "other.jsonl:1: "),
        "wrong column": ({"columns": {"question": "ask"}}, [], "domain.jsonl:1: no column 'ask'"),
        "missing file": ({"path": str(folder / "none.jsonl")}, [], "none.jsonl: no such file"),
        "template collision": ({"path": str(collision)}, ["data.sanitize=false"], "collision.jsonl:2: "),
        "no answer": ({"path": str(roles)}, [], "roles.jsonl:1: "),
        "empty file": ({"path": str(blank)}, [], "blank.jsonl"),
        "longer than a pack": ({"path": str(long)}, [], "long.jsonl:2: the conversation has"),
        "empty after filtering": ({"path": str(long)}, ["data.max_length=8", "data.overlong=drop"], "no sample is"),
        "unknown key": ({"pth": "x"}, [], "data.customer.0.pth: unknown key; did you mean 'data.customer.0.path'?"),
        "unknown override": ({}, ["training.max_step=5"], "did you mean 'training.max_steps'?"),
        "rank over the matrix": ({}, ["lora.rank=64"], "rank: 64 exceeds the smaller side"),
        "unknown module": ({}, ["lora.target_modules=[q]"], "target_modules: "),
        "no model": ({}, [f"model.path={folder / 'nothing'}"], "model.path: no folder"),
        "unknown architecture": ({}, [f"model.path={folder / 'gpt'}"], "gpt2"),
    }  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["malformed line", "unknown columns", "wrong column", "missing file", "template collision", "no answer",
     "empty file", "longer than a pack", "empty after filtering", "unknown key", "unknown override",
     "rank over the matrix", "unknown module", "no model", "unknown architecture"],
)  # fmt: skip
def test_bad_input_is_one_clear_error(world: Path, tmp_path: Path, run: Run, name: str) -> None:
    changes, overrides, message = bad_inputs(world, tmp_path)[name]
    content = settings(world, tmp_path / "out")
    content["data"]["customer"][0].update(changes)
    file = write_recipe(tmp_path / "r.yaml", content)
    for command in ("check", "train"):
        code, _, err = run(command, file, *overrides)
        assert code == 1
        assert err.startswith("error: ")
        assert message in err or (command == "train" and name == "no model")
        assert "Traceback" not in err
        assert len(err.splitlines()) == 1


def test_a_tokenizer_of_another_model(world: Path, tmp_path: Path, run: Run) -> None:
    base = write_model(tmp_path / "base", vocab_size=100)
    content = settings(world, tmp_path / "out")
    content["model"]["path"] = str(base)
    code, _, err = run("check", write_recipe(tmp_path / "r.yaml", content))
    assert code == 1
    assert "more than the model's vocabulary of 100" in err


def test_usage_errors_exit_with_two(tmp_path: Path, run: Run) -> None:
    assert run("train")[0] == 2
    assert run("bake", "x")[0] == 2
    assert run("train", tmp_path / "r.yaml", "--resume", "--overwrite")[0] == 2
    assert run("check", tmp_path / "none.yaml")[0] == 1


def test_help_and_version(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for command in ("check", "train", "evaluate", "export"):
        assert command in out
    assert run("--version")[1].strip() == cli.__version__


def test_an_interrupt_says_how_to_go_on(world: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("forge_core.train.train", stop)
    code, _, err = run("train", write_recipe(tmp_path / "r.yaml", settings(world, tmp_path / "out")))
    assert code == 130
    assert "--resume" in err


def test_a_traceback_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["forge-core", "--traceback", "check", str(tmp_path / "none.yaml")])
    with pytest.raises(FileNotFoundError):
        cli.main()
    monkeypatch.setattr(cli, "_show_traceback", False)
