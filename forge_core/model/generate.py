"""Batched generation with a key-value cache: prompts are prefilled as packs, then each sequence grows by one a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from forge_core.kernels import PackPlan, linear_argmax

from .cache import KVCache, PrefillAttend
from .decoder import PackedAttend
from .prefix import common_prefix, pack_prefixes
from .sampling import choose_tokens
from .step import DecodeStep

if TYPE_CHECKING:
    from .decoder import CausalLM

_RESERVED_TOKENS = 128  # of room for new tokens at most, made before there are any: growing the cache copies it
_PREFILL_TOKENS = 8192  # prompts are prefilled in packs of about this many tokens, to bound the activations


@dataclass(eq=False)
class _Sequence:
    index: int  # of the prompt
    length: int  # tokens in the cache
    last: int  # the newest token, not yet in the cache
    uniforms: np.ndarray | None  # one number in [0, 1) per new token; None for greedy
    new: list[int] = field(default_factory=list)


@torch.no_grad()
def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    stop: Sequence[int | Sequence[int]] = (),
    batch_size: int = 64,
) -> list[list[int]]:
    """Continue each prompt; arguments, result and errors are those of `CausalLM.generate`, the public name."""
    stops = _stop_sequences(stop)
    _check(model, prompts, max_new_tokens, temperature, top_p, top_k, batch_size)
    waiting = iter(range(len(prompts)))
    results: list[list[int]] = [[] for _ in prompts]
    if not prompts:
        return results
    device = model.lm_head_weight.device
    rows = min(batch_size, len(prompts))
    cache = KVCache(model.config, rows, dtype=model.lm_head_weight.dtype, device=device)
    step = DecodeStep(model, cache)
    active: list[_Sequence] = []
    last_of_stops = {stop[-1] for stop in stops}

    def accept(sequences: list[_Sequence], hidden: Tensor) -> list[_Sequence]:
        """Choose the next token of each sequence; return those that have ended."""
        uniform = None
        if temperature > 0.0:
            numbers = [sequence.uniforms[len(sequence.new)] for sequence in sequences if sequence.uniforms is not None]
            uniform = torch.tensor(numbers, dtype=torch.float64, device=device)
        if uniform is None and model.logit_softcap is None:  # capped logits that saturate are equal
            tokens = linear_argmax(hidden, model.lm_head_weight).tolist()
        else:
            tokens = choose_tokens(
                model.logits(hidden), uniform, temperature=temperature, top_p=top_p, top_k=top_k
            ).tolist()
        ended = []
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.last = token
            sequence.new.append(token)
            matched = None
            if token in last_of_stops:
                matched = next((s for s in stops if tuple(sequence.new[-len(s) :]) == s), None)
            if matched is not None or len(sequence.new) == max_new_tokens:
                results[sequence.index] = sequence.new[: -len(matched)] if matched else sequence.new
                ended.append(sequence)
        return ended

    while True:
        # Admit in groups: prefilling one prompt at a time would stall the running sequences again and again.
        if len(active) <= rows * 3 // 4:
            for group in _prefill_groups(prompts, waiting, rows - len(active)):
                sequences = [
                    _Sequence(i, len(prompts[i]), -1, _uniforms(seed, i, max_new_tokens, temperature)) for i in group
                ]
                first = len(active)
                active += sequences
                room = min(max_new_tokens, _RESERVED_TOKENS)
                cache.reserve(max(sequence.length for sequence in sequences) + room)
                _retire(cache, active, accept(sequences, _prefill(model, cache, [prompts[i] for i in group], first)))
        if not active:
            return results
        _retire(cache, active, accept(active, _decode(step, active)))


def _prefill(model: CausalLM, cache: KVCache, prompts: list[Sequence[int]], first_row: int) -> Tensor:
    """Run prompts as one pack, fill rows first_row... of the cache; hidden state of each prompt's last token."""
    device = model.lm_head_weight.device
    pack = pack_prefixes(prompts)
    source = np.concatenate(pack.rows)
    lengths = [len(prompt) for prompt in prompts]
    cache_rows = np.repeat(np.arange(first_row, first_row + len(prompts)), lengths)
    cache_positions = np.concatenate([np.arange(length) for length in lengths])
    positions = np.empty_like(pack.input_ids)
    positions[source] = cache_positions

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    parents = pack.parents if (pack.parents >= 0).any() else None
    plan = PackPlan(pack.cu_seqlens, parents=parents)
    packed = PackedAttend(tensor(pack.cu_seqlens), plan, None if parents is None else tensor(parents))
    attend = PrefillAttend(cache, packed, tensor(source), tensor(cache_rows), tensor(cache_positions))
    last = tensor(np.array([rows[-1] for rows in pack.rows]))
    return model.model(tensor(pack.input_ids), tensor(positions), attend, rows=last)


def _decode(step: DecodeStep, active: list[_Sequence]) -> Tensor:
    """Run the newest token of each sequence; its hidden state, [n, hidden]."""
    device = step.model.lm_head_weight.device
    lengths = [sequence.length for sequence in active]
    step.cache.reserve(max(lengths) + 1)
    hidden = step(
        torch.tensor([sequence.last for sequence in active], device=device), torch.tensor(lengths, device=device)
    )
    for sequence in active:
        sequence.length += 1
    return hidden


def _retire(cache: KVCache, active: list[_Sequence], ended: list[_Sequence]) -> None:
    """Drop ended sequences; the last running ones move into the rows that become free."""
    for row in sorted((active.index(sequence) for sequence in ended), reverse=True):  # so that none that ended moves
        last = active.pop()
        if row < len(active):
            cache.move(len(active), row, last.length)
            active[row] = last


def _prefill_groups(prompts: Sequence[Sequence[int]], waiting: Iterator[int], free: int) -> Iterator[list[int]]:
    """Up to `free` waiting prompts, in groups of `_PREFILL_TOKENS` tokens; what one shares with the last is free."""
    group: list[int] = []
    tokens = 0
    for _, index in zip(range(free), waiting, strict=False):
        shared = common_prefix(np.array(prompts[group[-1]]), np.array(prompts[index])) if group else 0
        group.append(index)
        tokens += len(prompts[index]) - shared
        if tokens >= _PREFILL_TOKENS:
            yield group
            group, tokens = [], 0
    if group:
        yield group


def _uniforms(seed: int, index: int, count: int, temperature: float) -> np.ndarray | None:
    if temperature == 0.0:
        return None
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, index)))).random(count)


def _stop_sequences(stop: Sequence[int | Sequence[int]]) -> list[tuple[int, ...]]:
    """Stops as sequences, longest first, so that the longest match is the one cut off."""
    sequences = [tuple(entry) if isinstance(entry, Sequence) else (int(entry),) for entry in stop]
    if not all(sequences):
        raise ValueError("stop: got an empty sequence; expected token ids and sequences of at least one id")
    return sorted(sequences, key=len, reverse=True)


def _check(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    batch_size: int,
) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    if temperature < 0.0:
        raise ValueError(f"temperature: expected 0 (greedy) or more, got {temperature}")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p: expected a mass in (0, 1], got {top_p}")
    if top_k < 0:
        raise ValueError(f"top_k: expected 0 (all tokens) or more, got {top_k}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    vocab, positions = model.config.vocab_size, model.config.max_position_embeddings
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompts[{i}]: empty; a prompt needs at least one token")
        if min(prompt) < 0 or max(prompt) >= vocab:
            raise ValueError(f"prompts[{i}]: token ids must lie in 0..{vocab - 1}, got {min(prompt)}..{max(prompt)}")
        if len(prompt) + max_new_tokens > positions:
            raise ValueError(
                f"prompts[{i}]: {len(prompt)} tokens and max_new_tokens = {max_new_tokens} exceed the model's "
                f"max_position_embeddings = {positions}; shorten the prompt or ask for fewer tokens"
            )
