"""Low-rank adapters on the decoder's linear layers (Hu et al., arXiv 2106.09685)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from forge_core.kernels.dora import adapted_norm
from forge_core.kernels.quantized import is_quantized, nominal

from .decoder import CausalLM
from .layers import Linear, LowRank

ALL_LINEAR = "all-linear"
PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")  # modules that an adapter adds to a linear layer


@dataclass(frozen=True)
class LoraConfig:
    """Which layers get an adapter, and how it is scaled.

    rank: columns of `lora_B` and rows of `lora_A`; at most the smaller side of every target matrix.
    alpha: the product is scaled by `alpha / rank`, with `use_rslora` by `alpha / sqrt(rank)` (arXiv 2312.03732).
    dropout: probability of dropping an input element of the adapter while training.
    target_modules: "all-linear" (every linear layer of the decoder layers, not the head), or names such as "q_proj" or
        "layers.3.mlp.up_proj", each matching the modules whose path ends with it.
    lora_plus_ratio: learning rate of `lora_B` over that of `lora_A` (LoRA+, arXiv 2402.12354); read by the trainer.
    use_dora: also train the magnitude of each row of the adapted matrix (DoRA, arXiv 2402.09353).
    """

    rank: int = 32
    alpha: float = 64
    dropout: float = 0.0
    target_modules: str | list[str] = ALL_LINEAR
    use_rslora: bool = False
    lora_plus_ratio: float = 16.0
    use_dora: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank: expected an integer >= 1, got {self.rank!r}")
        if not self.alpha > 0 or not math.isfinite(self.alpha):
            raise ValueError(f"alpha: expected a positive number, got {self.alpha!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {self.dropout!r}")
        if not self.lora_plus_ratio > 0 or not math.isfinite(self.lora_plus_ratio):
            raise ValueError(f"lora_plus_ratio: expected a positive number, got {self.lora_plus_ratio!r}")
        if isinstance(self.target_modules, str):
            if self.target_modules != ALL_LINEAR:
                raise ValueError(
                    f"target_modules: expected {ALL_LINEAR!r} or a list of names, got {self.target_modules!r}"
                )
        elif not self.target_modules:
            raise ValueError(f"target_modules: got an empty list; name at least one layer, or use {ALL_LINEAR!r}")

    @property
    def scaling(self) -> float:
        """Factor of the adapter's product."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


def add_lora(model: CausalLM, config: LoraConfig, *, seed: int = 0) -> None:
    """Freeze the model and attach float32 adapters; the model's output does not change until they are trained.

    `lora_A` is uniform in +-1/sqrt(in_features), `lora_B` zero, drawn on the CPU from `seed` in layer order; magnitudes
    are the norms of the frozen rows.

    Raises:
        ValueError: the model has adapters already, a target module does not exist, or the rank exceeds a matrix.
    """
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, AdapterWeights] = {}
    for name, linear in target_linears(model, config).items():
        bound = 1 / math.sqrt(linear.in_features)
        lora_a = torch.empty(config.rank, linear.in_features).uniform_(-bound, bound, generator=generator)
        weights[name] = AdapterWeights(lora_a, torch.zeros(linear.out_features, config.rank), None)
    attach(model, config, weights)


class AdapterWeights(NamedTuple):
    """What a linear layer's adapter is made of, float32."""

    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor | None  # [out] of a DoRA adapter; None: the norms of the adapted rows


def attach(model: CausalLM, config: LoraConfig, weights: dict[str, AdapterWeights]) -> None:
    """Freeze the model and attach adapters with the given weights per module path.

    Raises:
        ValueError: the model has adapters already, or the rank exceeds one of the matrices.
    """
    if model.lora_config is not None:
        raise ValueError("model: it has adapters already; remove_lora(model) takes them off first")
    linears = adaptable_linears(model)
    too_small = [
        f"{name} [{linears[name].out_features}, {linears[name].in_features}]"
        for name in weights
        if config.rank > min(linears[name].out_features, linears[name].in_features)
    ]
    if too_small:
        raise ValueError(
            f"rank: {config.rank} exceeds the smaller side of {len(too_small)} target matrices, such as {too_small[0]}"
            "; choose a smaller rank or leave these modules out of target_modules"
        )
    model.requires_grad_(False)
    for name, (lora_a, lora_b, magnitude) in weights.items():
        linear = linears[name]
        device = linear.weight.device
        linear.lora_A, linear.lora_B = _part(lora_a, device), _part(lora_b, device)
        if config.use_dora:
            if magnitude is None:
                magnitude = adapted_norm(linear.weight, linear.lora_A.weight, linear.lora_B.weight, config.scaling)
            linear.lora_magnitude_vector = _part(magnitude, device)
        linear.scaling, linear.dropout, linear.adapter_enabled = config.scaling, config.dropout, True
    model.lora_config = config


def remove_lora(model: CausalLM) -> None:
    """Take the adapters off (merged ones are unmerged first); parameters stay frozen. Without adapters: no effect."""
    if model.lora_config is None:
        return
    unmerge_lora(model)
    for linear in _adapted(model).values():
        linear.lora_A = linear.lora_B = linear.lora_magnitude_vector = None
        linear.scaling = linear.dropout = 0.0
    model.lora_config = None


def adapter_parameters(model: CausalLM) -> dict[str, nn.Parameter]:
    """The adapters' parameters by name, `model.layers.0.self_attn.q_proj.lora_A.weight` and so on, in layer order."""
    return {
        f"{name}.{part}.weight": holder.weight
        for name, linear in _adapted(model).items()
        for part, holder in ((part, getattr(linear, part)) for part in PARTS)
        if holder is not None
    }


@torch.no_grad()
def merge_lora(model: CausalLM) -> None:
    """Add each adapter's product to its frozen weight: `W + scaling * B A`, in float32 and rounded once.

    The rows of a DoRA adapter are then scaled to their magnitudes.

    The frozen weights are kept, so that `unmerge_lora` restores them bit for bit. Rounding to bfloat16 loses part of a
    small update: for exact evaluation leave adapters unmerged. A merged model merges into nothing more.

    Raises:
        ValueError: the model has no adapters, or they lie on quantised weights.
    """
    if model.lora_config is None:
        raise ValueError("model: it has no adapters to merge; add_lora or load_adapter attaches them")
    if any(is_quantized(nominal(linear.weight)) for linear in _adapted(model).values()):
        raise ValueError(
            "model: its adapters lie on 4-bit weights, which would round the update away; make the weights dense first "
            "with dequantize_model(model)"
        )
    for linear in _adapted(model).values():
        if linear.unmerged_weight is None and linear.lora_A is not None and linear.lora_B is not None:
            wide = torch.float64 if linear.weight.dtype == torch.float64 else torch.float32
            update = linear.lora_B.weight.to(wide) @ linear.lora_A.weight.to(wide)
            linear.unmerged_weight = linear.weight.detach().clone()
            merged = linear.weight.to(wide).add(update, alpha=linear.scaling)
            if linear.lora_magnitude_vector is not None:
                merged *= (linear.lora_magnitude_vector.weight.to(wide) / merged.norm(dim=1))[:, None]
            linear.weight.copy_(merged)


@torch.no_grad()
def unmerge_lora(model: CausalLM) -> None:
    """Restore the frozen weights bit for bit; the adapters act again in the forward pass. Unmerged: no effect."""
    for linear in _adapted(model).values():
        if linear.unmerged_weight is not None:
            linear.weight.copy_(linear.unmerged_weight)
            linear.unmerged_weight = None


def is_merged(model: CausalLM) -> bool:
    """Whether the adapters are merged into the weights."""
    return any(linear.unmerged_weight is not None for linear in _adapted(model).values())


@contextmanager
def base_model_only(model: CausalLM) -> Iterator[None]:
    """Switch the adapters off within the block, merged or not, and back to the same bits afterwards."""
    adapted = list(_adapted(model).values())
    before = [(linear.adapter_enabled, linear.unmerged_weight is not None) for linear in adapted]
    unmerge_lora(model)
    for linear in adapted:
        linear.adapter_enabled = False
    try:
        yield
    finally:
        for linear, (enabled, _) in zip(adapted, before, strict=True):
            linear.adapter_enabled = enabled
        if any(merged for _, merged in before):
            merge_lora(model)


def adaptable_linears(model: CausalLM) -> dict[str, Linear]:
    """The linear layers that can carry an adapter, by path, in layer order: all of them but the head."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Linear) and module is not model.lm_head
    }


def target_linears(model: CausalLM, config: LoraConfig) -> dict[str, Linear]:
    """The layers that `config.target_modules` selects.

    Raises:
        ValueError: a name matches no layer.
    """
    linears = adaptable_linears(model)
    if isinstance(config.target_modules, str):
        return linears
    unknown = [
        target
        for target in config.target_modules
        if not any(name == target or name.endswith(f".{target}") for name in linears)
    ]
    if unknown:
        leaves = dict.fromkeys(re.sub(r".*\.", "", name) for name in linears)
        raise ValueError(
            f"target_modules: no layer of this {model.config.model_type} model is called {', '.join(unknown)}; "
            f"expected {ALL_LINEAR!r} or some of {', '.join(leaves)}, or paths such as {next(iter(linears))}"
        )
    return {
        name: linear
        for name, linear in linears.items()
        if any(name == target or name.endswith(f".{target}") for target in config.target_modules)
    }


def _adapted(model: CausalLM) -> dict[str, Linear]:
    return {name: linear for name, linear in adaptable_linears(model).items() if linear.lora_A is not None}


def _part(weight: Tensor, device: torch.device) -> LowRank:
    return LowRank(weight.detach().to(device, torch.float32, copy=True))
