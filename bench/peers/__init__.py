"""What other projects do, in our own words: their order of operations on the same inputs, or their package itself."""

from collections.abc import Callable
from typing import Any

import torch


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` for the one shape it is given."""
    return torch.compile(function, dynamic=False, fullgraph=True)
