"""lora_linear, forward and backward, against the frozen matmuls alone (the floor) and PEFT's arithmetic."""

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.registry import Candidates, Thunk, workload
from forge_core.kernels import lora_linear

SHAPES = [(2048, 576, 576, 32), (2048, 576, 1536, 32), (1024, 4096, 4096, 16)]


def peft(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float, dropout_p: float = 0.0) -> Tensor:
    """PEFT's order of operations; float32 adapters (its default) cast x up and the sum back down."""
    result = F.linear(x, weight)
    wide = F.dropout(x.to(a.dtype), dropout_p) if dropout_p else x.to(a.dtype)
    return (result + F.linear(F.linear(wide, a), b) * scaling).to(x.dtype)


def _register(tokens: int, k: int, n: int, rank: int) -> None:
    @workload(
        "lora_linear",
        f"{tokens}x{k}->{n} r{rank} fwd+bwd",
        flops=4.0 * tokens * k * n + 6.0 * tokens * rank * (k + n),  # base forward and dX; six skinny products
        bytes=2.0 * (2 * k * n + 3 * tokens * k + 2 * tokens * n),
    )
    def forward_backward() -> Candidates:
        x = torch.randn(tokens, k, dtype=torch.bfloat16, requires_grad=True)
        weight = (torch.randn(n, k) / k**0.5).bfloat16()
        a, b = torch.randn(rank, k) / k**0.5, torch.randn(n, rank) / rank**0.5
        master = [a.requires_grad_(), b.requires_grad_()]
        half = [a.detach().bfloat16().requires_grad_(), b.detach().bfloat16().requires_grad_()]
        dy = torch.randn(tokens, n, dtype=torch.bfloat16)

        def candidate(function, adapters: list[Tensor]) -> Thunk:  # type: ignore[no-untyped-def]
            return lambda: torch.autograd.grad(function(*adapters), [x, *adapters], dy)

        return {
            "forge": candidate(lambda a, b: lora_linear(x, weight, a, b, scaling=2.0), master),
            "frozen matmuls": candidate(lambda: F.linear(x, weight), []),
            "PEFT bf16": candidate(lambda a, b: peft(x, weight, a, b, 2.0), half),
            "PEFT default": candidate(lambda a, b: peft(x, weight, a, b, 2.0), master),
            "PEFT p=0.1": candidate(lambda a, b: peft(x, weight, a, b, 2.0, 0.1), half),
        }


for shape in SHAPES:
    _register(*shape)
