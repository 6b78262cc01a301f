"""The weighted loss of a linear head, as others compute it; all return the scalar loss (a tensor)."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

WeightedLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def full_logits(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """What trainers do without a fused loss: all logits, float32 softmax, weights on the unreduced loss."""
    losses = F.cross_entropy(F.linear(hidden, head).float(), targets, reduction="none")
    return (losses * weights).sum() / weights.sum()


def liger() -> WeightedLoss:
    """Liger's fused linear cross-entropy; weights need its unreduced loss."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(reduction="none")

    def loss(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return (fused(head, hidden, targets) * weights).sum() / weights.sum()

    return loss


def cut_cross_entropy() -> WeightedLoss:
    """Cut cross-entropy; likewise unreduced."""
    from cut_cross_entropy import linear_cross_entropy

    def loss(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return (linear_cross_entropy(hidden, head, targets, reduction="none") * weights).sum() / weights.sum()

    return loss


def logprobs_of_logits(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of its distribution, from all logits in float32."""
    logprobs = F.linear(hidden, head).float().log_softmax(-1)
    return logprobs.gather(-1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def matmuls_alone(hidden: Tensor, head: Tensor, rows: int, frozen: bool) -> Callable[[], object]:
    """The floor: the logits of as many rows as count and the gradients from them, without any softmax."""
    x, w = hidden.detach()[:rows], head.detach()

    def call() -> object:
        logits = x @ w.T
        return logits @ w, None if frozen else logits.T @ x

    return call


def inputs(tokens: int, width: int, vocab: int, rows: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, head, targets and weights; `rows` of the weights, at random, are not zero."""
    hidden = torch.randn(tokens, width, dtype=torch.bfloat16, device=device, requires_grad=True)
    head = (torch.randn(vocab, width, device=device) / width**0.5).bfloat16()
    targets = torch.randint(vocab, (tokens,), device=device)
    weights = torch.rand(tokens, device=device) + 0.5
    weights[torch.randperm(tokens, device=device)[rows:]] = 0
    return hidden, head, targets, weights
