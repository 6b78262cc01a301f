"""Evaluation mode of a model, for the length of a block."""

import contextlib
from collections.abc import Iterator

import torch

from forge_core.model import CausalLM


@contextlib.contextmanager
def evaluating(model: CausalLM) -> Iterator[None]:
    """Within the block: no gradients, no dropout; afterwards the mode the model came in."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
