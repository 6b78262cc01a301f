"""The base model and a tuned one on the evaluation sets of a recipe."""

from collections.abc import Callable
from pathlib import Path

import torch

from forge_core.data import Tokenizer
from forge_core.model import load_adapter, load_model
from forge_core.recipe import Recipe

from .device import pick_device
from .sets import Results, measure_sets, prepare_sets


def compare_with_base(
    recipe: Recipe,
    *,
    adapter: Path | None = None,
    model: Path | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Results]:
    """Measure the recipe's base model and, where one is named, the tuned model.

    Args:
        recipe: names the base model and the sets.
        adapter: PEFT folder of a tuned adapter.
        model: folder of a tuned model (full rank).
        progress: called with what is being done.

    Returns:
        {"base": results} and, with an adapter or model, "tuned"; predictions included.

    Raises:
        ValueError: the recipe has no evaluation sets.
    """
    if not recipe.evaluation.sets:
        raise ValueError("evaluation.sets: the recipe lists none, so there is nothing to measure")
    tokenizer = Tokenizer.from_pretrained(recipe.model.path)
    sets = prepare_sets(recipe, tokenizer, progress=lambda name: progress(f"reading {name}"))
    device, dtype = pick_device(recipe), getattr(torch, recipe.model.dtype)
    progress("loading the base model")
    measured = load_model(recipe.model.path, dtype=dtype, device=device, quantize=recipe.model.quantize)
    results = {"base": measure_sets(measured, tokenizer, sets, progress=lambda name: progress(f"base model on {name}"))}
    if adapter is None and model is None:
        return results
    if adapter is not None:
        load_adapter(measured, adapter)
    elif model is not None:
        del measured
        progress("loading the tuned model")
        measured = load_model(model, dtype=dtype, device=device)
    results["tuned"] = measure_sets(measured, tokenizer, sets, progress=lambda name: progress(f"tuned model on {name}"))
    return results
