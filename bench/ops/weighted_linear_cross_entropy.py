"""weighted_linear_cross_entropy with a frozen head, forward and backward, against full logits in torch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.registry import Candidates, Thunk, workload
from forge_core.kernels import weighted_linear_cross_entropy

SHAPES = [(2048, 576, 49152), (512, 1024, 32000)]


def full_logits(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """What trainers do without a fused loss: all logits, float32 softmax, weights on the unreduced loss."""
    losses = F.cross_entropy(F.linear(hidden, head).float(), targets, reduction="none")
    return (losses * weights).sum() / weights.sum()


def _register(tokens: int, width: int, vocab: int, valid: float) -> None:
    rows = int(tokens * valid)

    @workload(
        "weighted_linear_cross_entropy",
        f"{tokens}x{width}x{vocab} frozen head{'' if valid == 1 else f', {valid:.0%} of rows valid'} fwd+bwd",
        flops=4.0 * rows * width * vocab,  # logits and dX
        bytes=2.0 * (2 * vocab * width + 2 * tokens * width),
    )
    def build() -> Candidates:
        hidden = torch.randn(tokens, width, dtype=torch.bfloat16, requires_grad=True)
        head = (torch.randn(vocab, width) / width**0.5).bfloat16()
        targets = torch.randint(vocab, (tokens,))
        weights = torch.rand(tokens) + 0.5
        weights[torch.randperm(tokens)[rows:]] = 0
        one = torch.ones(())

        def candidate(function) -> Thunk:  # type: ignore[no-untyped-def]
            return lambda: torch.autograd.grad(function(hidden, head, targets, weights), hidden, one)

        return {
            "forge": candidate(lambda *inputs: weighted_linear_cross_entropy(*inputs).loss),
            "full logits": candidate(full_logits),
        }


for shape in SHAPES:
    for share in (1.0, 0.5):
        _register(*shape, share)
