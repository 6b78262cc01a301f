"""Attention of one new token per sequence over its key/value cache."""

import torch
from torch import Tensor

from . import reference
from .library import register_op
from .registry import Op, cpp_reasons, no_reasons

OP = Op("decode_attention")


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of one query token per sequence to the first `lengths` tokens of its cache; for inference only.

    The last row of `packed_attention` for each sequence: the same formula, in float32 (float64 for float64 inputs).

    Args:
        q: [sequences, q_heads, d], float32, bfloat16, float16 or float64.
        keys: [rows, kv_heads, capacity, d], contiguous, dtype of q; sequence i is row i, rows >= sequences, and
            q_heads is a multiple of kv_heads. What lies behind a sequence's length is never read.
        values: shape and dtype of keys.
        lengths: int64 [sequences]: tokens of each sequence, the query's own included; 1 to capacity.
        window: the query sees the last `window` tokens only; >= 1.
        softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2, arXiv 2408.00118); > 0.
        scale: factor of q k^T; default `d ** -0.5`.
        backend: "auto" tries "cpp" (CPU), then "reference".

    Returns:
        [sequences, q_heads, d], dtype of q.

    Raises:
        ValueError: shapes or dtypes do not match, window or softcap is out of range, q, keys or values requires a
            gradient while gradients are recorded, or the named backend cannot take the inputs.
    """
    if q.dim() != 3:
        raise ValueError(f"q: got shape {list(q.shape)}, expected [sequences, q_heads, d]")
    for name, cache in (("keys", keys), ("values", values)):
        if cache.dim() != 4 or cache.shape[0] < q.shape[0] or cache.shape[3] != q.shape[2]:
            raise ValueError(
                f"{name}: got shape {list(cache.shape)}, expected [at least {q.shape[0]}, kv_heads, capacity, "
                f"{q.shape[2]}]"
            )
        if cache.dtype != q.dtype:
            raise ValueError(f"{name}: got {cache.dtype}, expected the dtype of q, {q.dtype}")
        if not cache.is_contiguous():
            raise ValueError(f"{name}: got strides {cache.stride()}, expected a contiguous cache")
    if values.shape != keys.shape or q.shape[1] % keys.shape[1] != 0:
        raise ValueError(
            f"keys, values: got shapes {list(keys.shape)} and {list(values.shape)}, expected equal ones whose number "
            f"of heads divides the {q.shape[1]} of q"
        )
    if lengths.dtype != torch.int64 or tuple(lengths.shape) != (q.shape[0],):
        raise ValueError(f"lengths: got {lengths.dtype} of shape {list(lengths.shape)}, expected int64 [{q.shape[0]}]")
    if window is not None and window < 1:
        raise ValueError(f"window: got {window}, expected at least 1, or None")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: got {softcap}, expected a number above 0, or None")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, keys, values)):
        raise ValueError("q, keys, values: one requires a gradient, but decode_attention is for inference; use no_grad")
    scale = q.shape[2] ** -0.5 if scale is None else scale
    return OP.select(backend, q, keys, values)(q, keys, values, lengths, window, softcap, scale)


def _run_cpp(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> Tensor:
    return torch.ops.forge.decode_attention(q, keys, values, lengths, window or 0, softcap or 0.0, scale)


OP.register("cpp", _run_cpp, lambda q, keys, values: cpp_reasons(q, keys, values))
OP.register("reference", reference.decode_attention, no_reasons)


def _fake(
    q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, window: int, softcap: float, scale: float
) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


register_op("decode_attention", _fake)
