"""One new token of each sequence through all layers of a decoder, in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import decode_reference
from .decode_stack import DecodeStack
from .library import register_op
from .linear_argmax import dense_bf16_reasons
from .registry import Op, no_reasons

OP = Op("decode_layers")


def decode_layers(
    x: Tensor,
    positions: Tensor,
    tables: Sequence[tuple[Tensor, Tensor]],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    stack: DecodeStack,
    *,
    backend: str = "auto",
) -> Tensor:
    """One new token of each sequence through the layers of `stack`; its key and value join the cache. For inference.

    The same as rms_norm, frozen_linear, rope, decode_attention and swiglu one after the other. "cpp" rounds less often:
    sums of a matmul stay float32 up to the activation and the residual addition.

    Args:
        x: [sequences, hidden], float32, bfloat16, float16 or float64: the embedded tokens.
        positions: int64 [sequences]: where each token goes; sequence i is row i of the cache.
        tables: cos and sin of each rotary embedding, [positions, head_dim / 2], float32 (float64 for float64 inputs).
        keys: one [rows, kv_heads, capacity, head_dim] per layer, contiguous, dtype of x, rows >= sequences. Changed in
            place: row i at positions[i]; what lies behind is never read.
        values: shapes and dtype of keys, changed in place.
        stack: weights and constants, dtype of x.
        backend: "auto" tries "cpp" (bfloat16 on a CPU with AVX512-BF16), then "reference".

    Returns:
        [sequences, hidden], dtype of x: the residual stream after the last layer, before the final norm.

    Raises:
        ValueError: shapes or dtypes do not match, a position lies outside cache or tables ("cpp"; the reference lets
            torch complain), or the named backend cannot take the inputs.
    """
    if x.dim() != 2:
        raise ValueError(f"x: got shape {list(x.shape)}, expected [sequences, hidden]")
    if positions.dtype != torch.int64 or positions.shape != x.shape[:1]:
        raise ValueError(
            f"positions: got {positions.dtype} of shape {list(positions.shape)}, expected int64 [{x.shape[0]}]"
        )
    if not len(keys) == len(values) == len(stack.layers):
        raise ValueError(
            f"keys, values: got {len(keys)} and {len(values)} entries, expected one per layer, {len(stack.layers)}"
        )
    run = OP.select(backend, x, keys, values, stack)
    return run(x, positions, [side for table in tables for side in table], list(keys), list(values), stack)


def _reasons(x: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], stack: DecodeStack) -> list[str]:
    return dense_bf16_reasons(x, keys[0], values[0]) + stack.not_supported_reasons


def _run_cpp(
    x: Tensor, positions: Tensor, tables: list[Tensor], keys: list[Tensor], values: list[Tensor], stack: DecodeStack
) -> Tensor:
    return torch.ops.forge.decode_layers(
        x, positions, tables, keys, values, stack.tensors, stack.slots, stack.windows, stack.table_of_layer,
        stack.q_heads, stack.activation, stack.eps, stack.weight_offset, stack.scale, stack.softcap or 0.0,
    )  # fmt: skip


OP.register("cpp", _run_cpp, _reasons)
OP.register("reference", decode_reference.decode_layers, no_reasons)


def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


register_op("decode_layers", _fake)
