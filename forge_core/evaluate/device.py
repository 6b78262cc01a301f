"""Where a recipe computes."""

import torch

from forge_core.recipe import Recipe


def pick_device(recipe: Recipe) -> torch.device:
    """The device of a recipe.

    Raises:
        ValueError: model.device is cuda and there is none.
    """
    available = torch.cuda.is_available()
    if recipe.model.device == "cuda" and not available:
        raise ValueError("model.device: got cuda, but torch sees no CUDA device; use auto or cpu")
    return torch.device("cuda" if available and recipe.model.device != "cpu" else "cpu")
