"""Frozen linear weights in 4 bits, in bitsandbytes' formats: the base of QLoRA (Dettmers et al., arXiv 2305.14314).

The weights of all linear layers but the head are packed, 64 values a block, and the blocks' scales once more in 8 bits
(0.52 bytes a weight); embeddings, norms, biases and adapters stay as they are. A layer makes its weight dense for each
matmul and keeps nothing of it: training is that of the dequantised model, bit for bit.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from forge_core.kernels import quantized

from .config import ModelConfig
from .decoder import CausalLM
from .lora import adaptable_linears

Format = Literal["nf4", "fp4"]
BLOCK = 64
_STATE = re.compile(r"(.+\.weight)\.(?:(?:nested_)?(?:absmax|quant_map)|quant_state\.bitsandbytes__(?:nf4|fp4))")


def check_quantize(model: CausalLM, quantize: str, device: torch.device) -> None:
    """Check that the linear layers of a model, which may be on "meta", can be packed for a device.

    Raises:
        ValueError: no such format, a checkpoint that is packed already, or a layer whose rows bitsandbytes could not
            decode there.
        ImportError: bitsandbytes is missing.
    """
    if quantize not in get_args(Format):
        raise ValueError(f"quantize: got {quantize!r}, expected one of {', '.join(get_args(Format))}, or None")
    if is_packed_checkpoint(model.config):
        raise ValueError(f"quantize: got {quantize!r} for a checkpoint that is in 4 bits already; leave quantize out")
    _bitsandbytes()
    uneven = [name for name, linear in adaptable_linears(model).items() if linear.in_features % BLOCK]
    if uneven and device.type == "cpu":
        linear = adaptable_linears(model)[uneven[0]]
        raise ValueError(
            f"quantize: {uneven[0]} has rows of {linear.in_features}, no multiple of the block of {BLOCK}, and so have "
            f"{len(uneven) - 1} more layers; bitsandbytes decodes such rows wrongly on the CPU (0.50). Use a GPU, or "
            "quantize null"
        )


def pack(weight: Tensor, quantize: str) -> nn.Parameter:
    """The weight as bitsandbytes' `Params4bit` on its device, frozen."""
    packed: nn.Parameter = (
        _bitsandbytes()
        .nn.Params4bit(weight, requires_grad=False, blocksize=BLOCK, compress_statistics=True, quant_type=quantize)
        .to(weight.device)
    )  # moving it is what quantises
    return packed


def is_packed_checkpoint(config: ModelConfig) -> bool:
    """Whether a checkpoint's weights are in bitsandbytes' 4 bits, as transformers saves them."""
    return config.raw.get("quantization_config") is not None


def check_full_rank(config: ModelConfig) -> None:
    """Check that all parameters of a checkpoint can be trained.

    Raises:
        ValueError: its weights are packed.
    """
    if is_packed_checkpoint(config):
        raise ValueError(
            "lora: got null, expected adapters, since the weights at model.path are in 4 bits, which cannot be "
            "trained at full rank; give lora, or another checkpoint"
        )


def packed_states(names: Iterable[str], linears: Collection[str]) -> dict[str, list[str]]:
    """Those of the weights `linears` that a checkpoint holds packed -> names of the tensors with scales and codes."""
    states: dict[str, list[str]] = {}
    for name in names:
        match = _STATE.fullmatch(name)
        if match and match[1] in linears:
            states.setdefault(match[1], []).append(name)
    return states


def unpack(packed: Tensor, state: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Parameter:
    """A packed weight of a checkpoint with its `packed_states`, as `Params4bit` that becomes dense in `dtype`."""
    weight: nn.Parameter = _bitsandbytes().nn.Params4bit.from_prequantized(packed, dict(state), device=packed.device)
    weight.quant_state.dtype = dtype  # type: ignore[attr-defined]
    return weight


def quantized_linears(model: CausalLM) -> list[str]:
    """Paths of the linear layers whose weights are packed."""
    return [name for name, linear in adaptable_linears(model).items() if is_packed(linear.weight)]


def is_packed(weight: Tensor) -> bool:
    """Whether a weight is quantised, packed or as a tensor that shows its nominal shape."""
    return quantized.is_quantized(quantized.nominal(weight))


@torch.no_grad()
def dequantize_model(model: CausalLM) -> None:
    """Make packed weights dense again, with the rounding that quantising left: what the adapters were trained on.

    The weights stay frozen. Such a model can be merged and saved. Without packed weights: no effect.
    """
    for linear in adaptable_linears(model).values():
        if is_packed(linear.weight):
            dense = quantized.dense(quantized.nominal(linear.weight))
            linear.weight = nn.Parameter(dense, requires_grad=False)


def _bitsandbytes() -> Any:
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ImportError(
            "quantize: 4-bit weights are made by bitsandbytes, which cannot be imported here; "
            f"pip install bitsandbytes ({error})"
        ) from error
