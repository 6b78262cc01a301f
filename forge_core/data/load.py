"""Step 8, load: the stream of training steps, reproducible to the bit, and the packs of an evaluation set."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from forge_core.kernels.pack import pack_sequences, pack_step

from .mix import MixedOrder
from .pack import PackedBatch, assemble_pack, check_fits
from .store import TokenStore

_STATE_VERSION = 1
# Packs' worth of samples looked at beyond a step, for its gaps: single packs of log-normal samples are 99.4 % full with
# two, 99.2 % with one (the emptiest of 240: 98 % and 70 %), 98.4 % with none.
_LOOKAHEAD = 2
_DRAWS = 64  # samples drawn at a time while a step is filled


class BatchStream:
    """Training steps of `packs_per_step` packs from several sources in fixed shares.

    The order is a function of (seed, stores, shares, budget, packs_per_step) and the step alone: the same on any number
    of ranks and after any restart. Samples wait in the order in which they were drawn; each step takes the oldest of
    them, as many as its packs hold, and later ones that fit the gaps.

    Args:
        stores: one per source, not empty.
        shares: float [sources], sum 1: the part of all tokens that comes from each source.
        share_of: what shares count: "tokens", or "loss_tokens" (those that are predicted with loss).
        budget: tokens of a pack.
        packs_per_step: packs of a step, over all ranks and accumulation steps.
        seed: decides the order within sources.

    Attributes:
        chain: hex SHA-256 chain over the (source, index) of everything consumed: equal chains, equal order.
        step: steps taken.

    Raises:
        DataError: a sample longer than a pack (file:line).
        ValueError: shares that do not sum to 1 or fit the stores, an unknown share_of, budget or packs_per_step < 1.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        shares: Sequence[float],
        *,
        share_of: Literal["tokens", "loss_tokens"] = "tokens",
        budget: int,
        packs_per_step: int,
        seed: int,
    ) -> None:
        if len(stores) != len(shares) or not stores:
            raise ValueError(f"shares: got {len(shares)} for {len(stores)} stores, expected one for each of them")
        if share_of not in ("tokens", "loss_tokens"):
            raise ValueError(f"share_of: got {share_of!r}, expected 'tokens' or 'loss_tokens'")
        for name, value in (("budget", budget), ("packs_per_step", packs_per_step)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        check_fits(stores, budget)
        self._stores = list(stores)
        self._budget = budget
        self._packs_per_step = packs_per_step
        self._arguments: dict[str, Any] = {
            "seed": seed,
            "shares": [float(share) for share in shares],
            "share_of": share_of,
            "budget": budget,
            "packs_per_step": packs_per_step,
            "stores": [store.key for store in stores],
        }
        counted = [store.loss_token_counts if share_of == "loss_tokens" else store.token_counts for store in stores]
        self._seed = seed
        self._shares = [float(share) for share in shares]
        self._share_of = share_of
        self._order = MixedOrder(counted, shares, seed)
        self._waiting: list[tuple[int, int]] = []
        self._consumed = np.zeros((3, len(stores)), np.int64)  # rows: samples, tokens, loss tokens
        self.step = 0
        self.chain = _hash_json(self._arguments)

    def next_step(self) -> list[PackedBatch]:
        """The packs of the next step: `packs_per_step` of `budget` tokens each."""
        return [assemble_pack(samples, self._stores, self._budget) for samples in self.next_sample_ids()]

    def next_sample_ids(self) -> list[list[tuple[int, int]]]:
        """The (source, index) pairs of each pack of the next step, which counts as consumed; reads no tokens."""
        wanted = self._budget * (self._packs_per_step + _LOOKAHEAD)
        lengths = [self._length(sample) for sample in self._waiting]
        total = sum(lengths)
        while total < wanted:
            for sample in self._order.draw(_DRAWS):
                self._waiting.append(sample)
                lengths.append(self._length(sample))
                total += lengths[-1]
        order, offsets = pack_step(lengths, self._budget, self._packs_per_step)
        packs = [[self._waiting[i] for i in order[a:b].tolist()] for a, b in pairwise(offsets.tolist())]
        taken = set(order.tolist())
        self._waiting = [sample for i, sample in enumerate(self._waiting) if i not in taken]
        self._account(packs)
        return packs

    def realised_shares(self) -> list[dict[str, float]]:
        """What has been consumed, per source.

        Each entry: samples, tokens, loss_tokens; token_share and loss_token_share of all sources' (0 before the first
        step); epochs, how often the source has been gone through.
        """
        shares = self._consumed / np.maximum(self._consumed.sum(axis=1, keepdims=True), 1)
        return [
            {
                "samples": int(self._consumed[0, source]),
                "tokens": int(self._consumed[1, source]),
                "loss_tokens": int(self._consumed[2, source]),
                "token_share": float(shares[1, source]),
                "loss_token_share": float(shares[2, source]),
                "epochs": float(self._consumed[0, source] / len(store)),
            }
            for source, store in enumerate(self._stores)
        ]

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs to give the next steps bit for bit; JSON-able."""
        state = {
            "version": _STATE_VERSION,
            "arguments": self._arguments,
            "step": self.step,
            "chain": self.chain,
            "order": self._order.state(),
            "waiting": [list(sample) for sample in self._waiting],
            "consumed": self._consumed.tolist(),
        }
        return {**state, "checksum": _hash_json(state)}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on behind the step at which `state()` was taken.

        Raises:
            ValueError: the state is damaged, or comes from a stream with other data, shares, seed or sizes, so that
                the order would differ; the message names what differs.
        """
        content = {name: value for name, value in state.items() if name != "checksum"}
        if state.get("version") != _STATE_VERSION:
            raise ValueError(f"stream state: version {state.get('version')}, expected {_STATE_VERSION}")
        different = [
            f"{name} was {state['arguments'].get(name)}, is {value}"
            for name, value in self._arguments.items()
            if state["arguments"].get(name) != value
        ]
        if different:
            raise ValueError(
                f"stream state: {'; '.join(different)}; the samples would come in another order than before. Resume "
                "with the recipe and data of the first run, or start a new run"
            )
        if state.get("checksum") != _hash_json(content):
            raise ValueError(
                "stream state: the checksum does not fit its content; the checkpoint is damaged or was edited"
            )
        self._order.restore(state["order"])
        self._waiting = [(source, index) for source, index in state["waiting"]]
        self._consumed = np.array(state["consumed"], np.int64)
        self.step = state["step"]
        self.chain = state["chain"]

    def verify(self, state: dict[str, Any]) -> None:
        """Draws all steps up to `state` anew, without reading tokens, and compares the chains.

        Raises:
            ValueError: this stream draws another order than the one that was consumed.
        """
        replay = BatchStream(
            self._stores,
            self._shares,
            share_of=self._share_of,
            budget=self._budget,
            packs_per_step=self._packs_per_step,
            seed=self._seed,
        )
        while replay.step < state["step"]:
            replay.next_sample_ids()
        if replay.chain != state["chain"]:
            raise ValueError(
                f"stream state: the chain of the first {state['step']} steps is {state['chain'][:12]}, this stream "
                f"draws {replay.chain[:12]}: other samples; resume with the version and data of the first run"
            )

    def _length(self, sample: tuple[int, int]) -> int:
        return int(self._stores[sample[0]].token_counts[sample[1]])

    def _account(self, packs: list[list[tuple[int, int]]]) -> None:
        link = hashlib.sha256(bytes.fromhex(self.chain))
        for samples in packs:
            link.update(np.array([len(samples), *(part for sample in samples for part in sample)], "<i8").tobytes())
            for source, index in samples:
                store = self._stores[source]
                self._consumed[:, source] += (1, store.token_counts[index], store.loss_token_counts[index])
        self.chain = link.hexdigest()
        self.step += 1


def iterate_packs(store: TokenStore, budget: int, *, limit: int | None = None) -> Iterator[PackedBatch]:
    """Every sample of the store once, packed best-fit into `budget` tokens; for evaluation. Always the same order.

    With `limit` the first so many samples only.

    Raises:
        DataError: a sample longer than a pack (file:line).
    """
    check_fits([store], budget)
    order, offsets = pack_sequences(store.token_counts[:limit], budget)
    for start, end in pairwise(offsets.tolist()):
        yield assemble_pack([(0, index) for index in order[start:end].tolist()], [store], budget)


def _hash_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
