"""Checkpoints: complete or absent, and everything that the next step depends on."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from forge_core.atomic import atomic_directory
from forge_core.model import CausalLM, LoraConfig, add_lora, load_adapter, load_model, save_adapter, save_model
from forge_core.model.quantize import check_full_rank
from forge_core.recipe import Recipe

from .identity import ResumeError
from .optimizer import MasterAdamW

STATE, OPTIMIZER, ADAPTER, MODEL = "trainer_state.json", "optimizer.safetensors", "adapter", "model"
_FORMAT = 1
_RNG = "rng.torch"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """The last step that went into it."""
        return int(self.state["step"])


def checkpoint_paths(output_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    folder = output_dir / "checkpoints"
    entries = folder.iterdir() if folder.is_dir() else ()
    found = [
        (int(m[1]), entry) for entry in entries if (m := _NAME.fullmatch(entry.name)) and (entry / STATE).is_file()
    ]
    return [entry for _, entry in sorted(found)]


def save_weights(model: CausalLM, folder: Path) -> Path:
    """Write what was trained into `folder`: `adapter/` (PEFT) or, at full rank, `model/` (Hugging Face)."""
    if model.lora_config is not None:
        save_adapter(model, folder / ADAPTER)
        return folder / ADAPTER
    save_model(model, folder / MODEL)
    return folder / MODEL


def save_checkpoint(
    output_dir: Path, model: CausalLM, optimizer: MasterAdamW, state: dict[str, Any], *, keep: int
) -> Path:
    """Write `checkpoints/step-<step>`, then remove all but the newest `keep`.

    Args:
        output_dir: folder of the run.
        model: weights to save: its adapters, or all of it.
        optimizer: moments and master weights.
        state: JSON values to carry; `state["step"]` names the checkpoint.
        keep: how many stay, at least 1.
    """
    target = output_dir / "checkpoints" / f"step-{state['step']:08d}"
    with atomic_directory(target) as folder:
        save_weights(model, folder)
        save_file({**optimizer.state_tensors(), _RNG: torch.get_rng_state()}, folder / OPTIMIZER)
        files = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
        complete = {"format": _FORMAT, **state, "files": files}
        (folder / STATE).write_text(json.dumps(complete, indent=1), encoding="utf-8")
    for old in checkpoint_paths(output_dir)[:-keep]:
        shutil.rmtree(old)
    return target


def newest_checkpoint(output_dir: Path) -> Checkpoint | None:
    """Read the state of the newest checkpoint; None where there is none.

    Raises:
        ResumeError: its files are not those that were written, or another version wrote it.
    """
    paths = checkpoint_paths(output_dir)
    if not paths:
        return None
    path = paths[-1]
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ResumeError(f"{path / STATE}: not valid JSON ({error}); remove {path} to use an older one") from error
    if state.get("format") != _FORMAT:
        raise ResumeError(
            f"{path / STATE}: format {state.get('format')!r}, expected {_FORMAT}; use the version that wrote it"
        )
    for name, size in state["files"].items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            raise ResumeError(
                f"{path / name}: got {'no file' if found is None else f'{found} bytes'}, expected {size} bytes; the "
                f"checkpoint is damaged, remove {path} to resume from an older one"
            )
    return Checkpoint(path, state)


def build_model(recipe: Recipe, device: torch.device, checkpoint: Checkpoint | None = None) -> CausalLM:
    """Load the base with fresh adapters, or with the weights of a checkpoint; ready to train.

    Raises:
        FileNotFoundError, ValueError: the model's files do not fit, or a rank exceeds a matrix.
    """
    dtype = getattr(torch, recipe.model.dtype)
    if recipe.lora is None:
        path = recipe.model.path if checkpoint is None else checkpoint.path / MODEL
        model = load_model(path, dtype=dtype, device=device)
        check_full_rank(model.config)
        model.source = recipe.model.path
    else:
        model = load_model(recipe.model.path, dtype=dtype, device=device, quantize=recipe.model.quantize)
        if checkpoint is None:
            add_lora(model, lora_config(recipe), seed=recipe.seed)
        else:
            load_adapter(model, checkpoint.path / ADAPTER)
    model.set_activation_checkpointing(recipe.model.activation_checkpointing)
    return model


def lora_config(recipe: Recipe) -> LoraConfig:
    """The adapter options of a recipe, as the model takes them.

    Raises:
        ValueError: the recipe trains at full rank.
    """
    if recipe.lora is None:
        raise ValueError("lora: is null in this recipe, which trains at full rank")
    options = recipe.lora.model_dump()
    if not isinstance(options["target_modules"], str):
        options["target_modules"] = list(options["target_modules"])
    return LoraConfig(**options)


def restore_optimizer(checkpoint: Checkpoint, optimizer: MasterAdamW) -> None:
    """Take moments, master weights and torch's random state from a checkpoint.

    Raises:
        ValueError: the optimizer state belongs to other parameters.
    """
    tensors = load_file(checkpoint.path / OPTIMIZER)
    torch.set_rng_state(tensors.pop(_RNG))
    optimizer.load_state_tensors(tensors)
