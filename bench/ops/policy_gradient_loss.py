"""policy_gradient_loss with a frozen head, forward and backward, against full logits in torch."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.peers import compiled
from bench.registry import Candidates, Thunk, suite_device, workload
from forge_core.kernels import policy_gradient_loss
from forge_core.kernels.policy_gradient_loss import Objective

# tokens, width, vocabulary
SHAPES = {"cpu": [(2048, 576, 49152), (512, 1024, 32000)], "gpu": [(8192, 4096, 128256)]}
KL_COEF = 0.05
SEQUENCES = 8  # of equal length, for "sequence_clip"


def full_logits(
    hidden: Tensor, head: Tensor, targets: Tensor, advantages: Tensor, old: Tensor, ref: Tensor, entropy_coef: float,
    by_sequence: bool,
) -> Tensor:  # fmt: skip
    """What RL trainers do without a fused loss: all logits, float32 log-softmax, clipped ratio, k3, entropy."""
    logprobs = F.linear(hidden, head).float().log_softmax(-1)
    logprob = logprobs.gather(-1, targets[:, None])[:, 0]
    log_ratio = logprob - old
    if by_sequence:
        log_ratio = log_ratio.view(SEQUENCES, -1).mean(1).repeat_interleave(len(log_ratio) // SEQUENCES)
    ratio = log_ratio.exp()
    policy = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    kl = (ref - logprob).exp() - (ref - logprob) - 1
    loss = policy + KL_COEF * kl
    if entropy_coef != 0:
        loss = loss + entropy_coef * (logprobs.exp() * logprobs).sum(-1)
    return loss.mean()


def _register(suite: str, tokens: int, width: int, vocab: int, entropy_coef: float, objective: Objective) -> None:
    device = suite_device(suite)
    bonus = " + entropy" if entropy_coef else ""

    @workload(
        "policy_gradient_loss",
        f"{tokens}x{width}x{vocab} frozen head, {objective} + KL{bonus} fwd+bwd",
        suite=suite,
        flops=4.0 * tokens * width * vocab,  # logits and dX
        bytes=2.0 * (2 * vocab * width + 2 * tokens * width),
        headline=bool(entropy_coef),
    )
    def build() -> Candidates:
        hidden = torch.randn(tokens, width, dtype=torch.bfloat16, device=device, requires_grad=True)
        head = (torch.randn(vocab, width, device=device) / width**0.5).bfloat16()
        targets = torch.randint(vocab, (tokens,), device=device)
        advantages = torch.randn(tokens, device=device)
        with torch.no_grad():
            current = -F.cross_entropy(F.linear(hidden, head).float(), targets, reduction="none")
        old, ref = (current + 0.2 * torch.randn(tokens, device=device) for _ in range(2))
        one = torch.ones((), device=device)
        by_sequence = objective == "sequence_clip"
        cu_seqlens = torch.arange(0, tokens + 1, tokens // SEQUENCES, dtype=torch.int32, device=device)

        def candidate(function) -> Thunk:  # type: ignore[no-untyped-def]
            return lambda: torch.autograd.grad(function(hidden, head, targets, advantages, old, ref), hidden, one)

        def eager(*inputs: Tensor) -> Tensor:
            return full_logits(*inputs, entropy_coef, by_sequence)

        def forge(*inputs: Tensor, backend: str = "auto") -> Tensor:
            return policy_gradient_loss(
                *inputs, objective=objective, cu_seqlens=cu_seqlens if by_sequence else None, kl_coef=KL_COEF,
                entropy_coef=entropy_coef, backend=backend,
            ).loss  # fmt: skip

        result: Candidates = {"forge": candidate(forge)}
        if device == "cuda":  # "forge" is the first of the two that can run
            result["forge, rows in CUDA"] = candidate(partial(forge, backend="cuda"))
            result["forge, rows in Triton"] = candidate(partial(forge, backend="triton"))
        result["full logits"] = candidate(eager)
        result["full logits compiled"] = candidate(compiled(eager))
        return result


for suite, shapes in SHAPES.items():
    for shape in shapes:
        for coefficient in (0.0, 0.01):
            _register(suite, *shape, coefficient, "clip")
        _register(suite, *shape, 0.0, "sequence_clip")
