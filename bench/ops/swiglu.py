"""swiglu, forward and backward, against F.silu(gate) * up."""

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.peers import compiled
from bench.registry import Candidates, Thunk, suite_device, workload
from forge_core.kernels import swiglu

SHAPES = {"cpu": [(2048, 1536), (1024, 14336)], "gpu": [(8192, 14336)]}


def eager(gate: Tensor, up: Tensor) -> Tensor:
    """What every model file has."""
    return F.silu(gate) * up


def _register(suite: str, tokens: int, width: int) -> None:
    device = suite_device(suite)

    @workload(
        "swiglu",
        f"{tokens}x{width} fwd+bwd",
        suite=suite,
        bytes=2.0 * tokens * width * (3 + 5),  # forward: two in, one out; backward: three in, two out
    )
    def forward_backward() -> Candidates:
        gate, up = (
            torch.randn(tokens, width, dtype=torch.bfloat16, device=device, requires_grad=True) for _ in range(2)
        )
        dy = torch.randn_like(gate)

        def candidate(function) -> Thunk:  # type: ignore[no-untyped-def]
            return lambda: torch.autograd.grad(function(gate, up), (gate, up), dy)

        return {
            "forge": candidate(swiglu),
            "eager": candidate(eager),
            "torch.compile": candidate(compiled(eager)),
        }


for suite, shapes in SHAPES.items():
    for tokens, width in shapes:
        _register(suite, tokens, width)
