"""The result of a run as a folder that transformers, PEFT and vLLM load."""

import shutil
from pathlib import Path

import torch

from forge_core.atomic import atomic_directory
from forge_core.evaluate.device import pick_device
from forge_core.model import dequantize_model, load_adapter, load_model, merge_lora, save_model
from forge_core.recipe import Recipe

from .checkpoint import ADAPTER, MODEL, checkpoint_paths


def export(recipe: Recipe, to: Path, *, merge: bool = False) -> Path:
    """Write the run's result to `to`: the PEFT adapter, or with `merge` the base with the adapter merged in.

    The folder appears when it is complete. The model's tokenizer files come along.

    Args:
        recipe: of the finished run.
        to: folder to create; must not exist, or be empty.
        merge: a whole model in the Hugging Face layout. Full-rank runs always give one. Where the base was quantised,
            its weights are the rounded ones, which the adapter was trained on, in the recipe's dtype.

    Raises:
        FileNotFoundError: the run has no result yet.
        FileExistsError: something stands at `to`.
    """
    result = recipe.output_dir / (MODEL if recipe.lora is None else ADAPTER)
    if not result.is_dir():
        saved = checkpoint_paths(recipe.output_dir)
        hint = f"; its newest checkpoint is {saved[-1]}, finish it with --resume" if saved else "; train first"
        raise FileNotFoundError(f"output_dir: no result {result}{hint}")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise FileExistsError(f"--to: {to} is not empty; name a new folder")
    with atomic_directory(to) as folder:
        if recipe.lora is not None and merge:
            model = load_model(
                recipe.model.path,
                dtype=getattr(torch, recipe.model.dtype),
                device=pick_device(recipe) if recipe.model.quantize else "cpu",  # where it was quantised in training
                quantize=recipe.model.quantize,
            )
            dequantize_model(model)  # the adapter was trained on the rounded weights
            load_adapter(model, result)
            merge_lora(model)
            save_model(model, folder)
        else:
            shutil.copytree(result, folder, dirs_exist_ok=True)
            _copy_tokenizer(recipe.model.path, folder)
    return to


def _copy_tokenizer(source: Path, target: Path) -> None:
    for pattern in ("tokenizer*", "special_tokens_map.json", "chat_template*", "vocab.json", "merges.txt"):
        for file in source.glob(pattern):
            if file.is_file() and not (target / file.name).exists():
                shutil.copyfile(file, target / file.name)
