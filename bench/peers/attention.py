"""Attention inside the documents of a pack, as others do it. q [tokens, heads, d], k and v [tokens, kv_heads, d]."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.registry import Thunk


def sdpa_per_document(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """One scaled_dot_product_attention call per document."""
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([_sdpa(*part, is_causal=True) for part in parts])


def sdpa_block_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """One scaled_dot_product_attention call for the pack, with a [tokens, tokens] mask."""
    return _sdpa(q, k, v, attn_mask=mask)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:  # type: ignore[no-untyped-def]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)[0].transpose(0, 1)


def block_mask(lengths: list[int], device: str) -> Tensor:
    """bool [tokens, tokens]: earlier tokens of the same document."""
    document = _documents(lengths, device)
    position = torch.arange(len(document), device=device)
    return (document[:, None] == document[None, :]) & (position[:, None] >= position[None, :])


def flex_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Callable[[], Tensor]:
    """Compiled FlexAttention; its block mask is made here, outside of the time that is measured."""
    from torch.nn.attention import flex_attention as flex

    document = _documents(lengths, q.device)

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (document[i] == document[j]) & (i >= j)

    tokens = q.shape[0]
    mask = flex.create_block_mask(visible, None, None, tokens, tokens, device=str(q.device))
    attend = torch.compile(flex.flex_attention, dynamic=False)

    def call() -> Tensor:
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        return attend(*heads_first, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return call


FLASH_ATTN = {
    "flash-attn 2": "flash_attn_2_cuda",
    "flash-attn 3": "flash_attn_interface",
    "flash-attn 4": "flash_attn.cute",
}


def flash_attn(name: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Callable[[], Tensor]:
    """A flash-attn package's function for packs; `name` is a key of FLASH_ATTN, whose values tell that it is there."""
    module = importlib.import_module("flash_attn" if name == "flash-attn 2" else FLASH_ATTN[name])
    options = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": longest, "max_seqlen_k": longest}

    def call() -> Tensor:
        out = module.flash_attn_varlen_func(q, k, v, **options, causal=True)
        return out[0] if isinstance(out, tuple) else out

    return call


def torch_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Callable[[], Tensor]:
    """torch's own function for packs (FlashAttention 2)."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"window_size": (-1, 0)}  # causal
    # torch 2.11 takes fewer key/value heads as they come, later versions want to be told.
    if q.shape[1] != k.shape[1] and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    return lambda: varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)


def _documents(lengths: list[int], device: str | torch.device) -> Tensor:
    counts = torch.tensor(lengths, device=device)
    return torch.repeat_interleave(torch.arange(len(lengths), device=device), counts, output_size=sum(lengths))


def with_backward(function: Callable[[], Tensor], inputs: tuple[Tensor, ...], upstream: Tensor) -> Thunk:
    """Forward and backward of `function`."""
    return lambda: torch.autograd.grad(function(), inputs, upstream)
