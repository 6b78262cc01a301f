"""Choosing the next token from logits: greedy, or drawn with temperature, top-k and top-p."""

from __future__ import annotations

import torch
from torch import Tensor

_FIRST_CANDIDATES = 256  # sorted first for top-p; nearly always enough, and far cheaper than sorting a vocabulary


def choose_tokens(logits: Tensor, uniform: Tensor | None, *, temperature: float, top_p: float, top_k: int) -> Tensor:
    """Next token of each row.

    A draw inverts the cumulative distribution at one uniform number a row. Top-k is applied first, then top-p over
    what is left: the smallest set of most probable tokens whose mass reaches `top_p` (Holtzman, arXiv 1904.09751).

    Args:
        logits: [rows, vocab].
        uniform: float64 [rows] in [0, 1); None for greedy.
        temperature: > 0 when drawing.
        top_p: in (0, 1]; 1 keeps all.
        top_k: 0 keeps all.

    Returns:
        int64 [rows].
    """
    if uniform is None:
        return logits.max(dim=-1).indices  # the first of equals, as argmax; several times faster in bfloat16
    logits = logits.to(torch.float32 if logits.dtype != torch.float64 else torch.float64) / temperature
    if top_k == 0 and top_p == 1.0:
        return _invert(torch.softmax(logits, dim=-1), uniform)
    total = torch.logsumexp(logits, dim=-1, keepdim=True)
    vocab = logits.shape[-1]
    count = min(top_k or (_FIRST_CANDIDATES if top_p < 1.0 else vocab), vocab)
    values, indices = torch.topk(logits, count, dim=-1)
    if top_k:
        total = torch.logsumexp(values, dim=-1, keepdim=True)
    probabilities = torch.exp(values - total)
    if top_p < 1.0:
        if not top_k and count < vocab and bool((probabilities.sum(dim=-1) < top_p).any()):
            values, indices = torch.sort(logits, dim=-1, descending=True)
            probabilities = torch.exp(values - total)
        mass_before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(mass_before >= top_p, 0.0)
    return indices.gather(-1, _invert(probabilities, uniform)[:, None])[:, 0]


def _invert(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Index where the cumulative sum of each row passes `uniform` times the row's total."""
    cumulative = probabilities.to(torch.float64).cumsum(dim=-1)
    target = uniform[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)[:, 0]
    # Rounding can put the target on the total itself; the last token with any mass is meant then.
    last = probabilities.shape[-1] - 1 - (probabilities > 0).flip(-1).to(torch.int8).argmax(dim=-1)
    return torch.minimum(index, last)
