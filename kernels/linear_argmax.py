"""The most probable token of a language-model head, for greedy decoding."""

import torch
from torch import Tensor

from . import reference
from .library import register_op
from .registry import Op, cpp_reasons, no_reasons

OP = Op("linear_argmax")


def linear_argmax(hidden: Tensor, lm_head: Tensor, *, backend: str = "auto") -> Tensor:
    """Index of the largest logit of `hidden lm_head^T` in each row, the first of equals; no logits in memory.

    "cpp" compares logits in float32, the reference in the dtype of hidden: of logits that round to the same bfloat16
    number it takes the first, not the largest. For inference only: an index has no gradient.

    Args:
        hidden: [tokens, hidden], float32, bfloat16, float16 or float64.
        lm_head: [vocab, hidden], dtype of hidden, vocab at least 1.
        backend: "auto" tries "cpp" (bfloat16 on a CPU with AVX512-BF16), then "reference".

    Returns:
        int64 [tokens].

    Raises:
        ValueError: shapes or dtypes do not match, or the named backend cannot take the inputs.
    """
    if hidden.dim() != 2 or lm_head.dim() != 2 or hidden.shape[1] != lm_head.shape[1] or lm_head.shape[0] == 0:
        raise ValueError(
            f"hidden, lm_head: got shapes {list(hidden.shape)} and {list(lm_head.shape)}, expected [tokens, hidden] "
            "and [vocab, hidden], vocab at least 1"
        )
    if lm_head.dtype != hidden.dtype:
        raise ValueError(f"lm_head: got {lm_head.dtype}, expected the dtype of hidden, {hidden.dtype}")
    return OP.select(backend, hidden, lm_head)(hidden, lm_head)


def dense_bf16_reasons(*tensors: Tensor) -> list[str]:
    """What keeps an op that has loops for the bfloat16 dot product alone from taking these tensors."""
    reasons = cpp_reasons(*tensors)
    if not torch.ops.forge.has_bf16_dot_product():
        reasons.append("needs AVX512-BF16, which this CPU (or FORGE_CPU_ISA) does not have")
    if any(tensor.dtype != torch.bfloat16 for tensor in tensors):
        reasons.append("takes bfloat16 only")
    if any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors):
        reasons.append("takes dense tensors, neither sharded nor quantised")
    return reasons


def _run_cpp(hidden: Tensor, lm_head: Tensor) -> Tensor:
    return torch.ops.forge.linear_argmax(hidden, lm_head)


OP.register("cpp", _run_cpp, dense_bf16_reasons)
OP.register("reference", reference.linear_argmax, no_reasons)


def _fake(hidden: Tensor, lm_head: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=torch.int64)


register_op("linear_argmax", _fake)
