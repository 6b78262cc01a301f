"""Linear layers with an optional low-rank adapter, and the norms of the decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from forge_core.kernels import add_rms_norm, frozen_linear, lora_linear, rms_norm


class Linear(nn.Module):
    """`y = x W^T + b`, plus `scaling * (x A^T) B^T` where an adapter is attached.

    `lora_A` [rank, in] and `lora_B` [out, rank] are float32 master weights whatever the dtype of `weight`. So is
    `lora_magnitude_vector` [out] of a DoRA adapter: the norm of each row of `W + scaling * B A` becomes the magnitude.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.lora_A: LowRank | None = None
        self.lora_B: LowRank | None = None
        self.lora_magnitude_vector: LowRank | None = None
        self.scaling = 0.0
        self.dropout = 0.0
        self.adapter_enabled = True
        self.unmerged_weight: Tensor | None = None  # the frozen weight while the adapter is merged into `weight`

    @property
    def adapter_active(self) -> bool:
        """Whether the forward pass adds the adapter's product (attached, enabled and not merged)."""
        return self.lora_A is not None and self.adapter_enabled and self.unmerged_weight is None

    def forward(self, x: Tensor, dropout_seed: int | None = None) -> Tensor:
        """[..., in] -> [..., out]; `dropout_seed` None switches adapter dropout off."""
        return project(x, (self,), dropout_seed)[0]

    def extra_repr(self) -> str:
        """Sizes, and the adapter's where there is one."""
        adapter = "" if self.lora_A is None else f", rank={self.lora_A.weight.shape[0]}, scaling={self.scaling:g}"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}{adapter}"


def project(x: Tensor, linears: Sequence[Linear], dropout_seed: int | None = None) -> tuple[Tensor, ...]:
    """Apply linear layers that share their input; those with an active adapter run as one grouped `lora_linear`.

    Args:
        x: [..., in].
        linears: layers of the same input size.
        dropout_seed: seed of the adapters' dropout masks; None for no dropout.

    Returns:
        One [..., out_i] per layer.
    """
    adapted = [linear for linear in linears if linear.adapter_active]
    plain = [linear for linear in linears if not linear.adapter_active]
    results = dict(zip(plain, _plain(x, plain), strict=True))
    if not adapted:
        return tuple(results.values())
    lora_a = [linear.lora_A.weight for linear in adapted if linear.lora_A is not None]
    lora_b = [linear.lora_B.weight for linear in adapted if linear.lora_B is not None]
    magnitude = [None if m is None else m.weight for m in (linear.lora_magnitude_vector for linear in adapted)]
    first = adapted[0]
    dropout = first.dropout if dropout_seed is not None else 0.0
    seed = dropout_seed if dropout > 0.0 else None
    if len(adapted) == 1:
        results[first] = lora_linear(
            x, first.weight, lora_a[0], lora_b[0],
            scaling=first.scaling, bias=first.bias, magnitude=magnitude[0], dropout_p=dropout, dropout_seed=seed,
        )  # fmt: skip
    else:
        bias = [linear.bias for linear in adapted] if any(linear.bias is not None for linear in adapted) else None
        grouped = lora_linear(
            x, [linear.weight for linear in adapted], lora_a, lora_b,
            scaling=first.scaling, bias=bias, magnitude=magnitude, dropout_p=dropout, dropout_seed=seed,
        )  # fmt: skip
        results.update(zip(adapted, grouped, strict=True))
    return tuple(results[linear] for linear in linears)


def _plain(x: Tensor, linears: Sequence[Linear]) -> tuple[Tensor, ...]:
    if not linears:
        return ()
    weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
    parameters = [*weights, *(bias for bias in biases if bias is not None)]
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
        return tuple(F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
    return frozen_linear(x, weights, biases)


class LowRank(nn.Module):
    """One part of an adapter; a module of its own so that its parameter is called `lora_A.weight`, as PEFT has it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale `weight + weight_offset`."""

    def __init__(self, size: int, *, eps: float, weight_offset: float) -> None:
        super().__init__()
        self.eps, self.weight_offset = eps, weight_offset
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        return rms_norm(x, self.weight, eps=self.eps, weight_offset=self.weight_offset)

    def after_adding(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and x + residual."""
        return add_rms_norm(x, residual, self.weight, eps=self.eps, weight_offset=self.weight_offset)

    def extra_repr(self) -> str:
        """Size and constants."""
        return f"{self.weight.shape[0]}, eps={self.eps:g}, weight_offset={self.weight_offset:g}"


class Embedding(nn.Module):
    """Token embedding, scaled by `scale` where the architecture does (Gemma: sqrt(hidden_size))."""

    def __init__(self, vocab_size: int, size: int, *, scale: float | None) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(vocab_size, size))

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [tokens] -> [tokens, size]."""
        embedded = F.embedding(input_ids, self.weight)
        if self.scale is None:
            return embedded
        # The factor is rounded to the model's dtype, by way of float32: such checkpoints are trained with it so.
        return embedded * torch.full((), self.scale, dtype=torch.float32, device=embedded.device).to(embedded.dtype)
