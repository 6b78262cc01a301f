"""add_rms_norm, forward and backward with a frozen weight, against an addition and the norm that follows it."""

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.peers import compiled
from bench.registry import Candidates, Thunk, suite_device, workload
from forge_core.kernels import add_rms_norm, reference

SHAPES = {"cpu": [(2048, 576), (1024, 4096)], "gpu": [(8192, 4096)]}


def eager(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The formula in float32, the sum rounded first."""
    total = x + residual
    return reference.rms_norm(total, weight, 1e-6, 0.0), total


def unfused(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """torch's own norm."""
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, 1e-6), total


def _register(suite: str, tokens: int, width: int) -> None:
    device = suite_device(suite)

    @workload(
        "add_rms_norm",
        f"{tokens}x{width} fwd+bwd",
        suite=suite,
        bytes=tokens * width * 2 * 8,  # forward: two in, two out; backward: dy, dsum and sum in, dx out
    )
    def forward_backward() -> Candidates:
        x, residual = (
            torch.randn(tokens, width, dtype=torch.bfloat16, device=device, requires_grad=True) for _ in range(2)
        )
        weight = torch.rand(width, dtype=torch.bfloat16, device=device)
        upstream = tuple(torch.randn(tokens, width, dtype=torch.bfloat16, device=device) for _ in range(2))

        def candidate(function) -> Thunk:  # type: ignore[no-untyped-def]
            return lambda: torch.autograd.grad(function(x, residual, weight), (x, residual), upstream)

        return {
            "forge": candidate(add_rms_norm),
            "F.rms_norm": candidate(unfused),
            "eager": candidate(eager),
            "torch.compile": candidate(compiled(eager)),
        }


for suite, shapes in SHAPES.items():
    for tokens, width in shapes:
        _register(suite, tokens, width)
