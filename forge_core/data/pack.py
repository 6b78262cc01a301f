"""Step 7, pack: samples side by side in one row of a fixed number of tokens, each its own document."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .read import DataError
from .store import TokenStore

IGNORE_INDEX = -100


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One pack: what the model and the loss take.

    Attributes:
        input_ids: int64 [budget]; 0 behind the last document.
        targets: int64 [budget], the next token of the same document where that has loss, else -100.
        token_weights: float32 [budget], the sample's weight where there is a target, else 0.
        source_ids: int32 [budget], the source each token comes from; 0 behind the last document.
        cu_seqlens: int32 [documents + 1], where documents begin; the last entry is where they end.
        sample_ids: (source, index in its store) of each document.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    token_weights: torch.Tensor
    source_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    sample_ids: list[tuple[int, int]]

    @property
    def tokens(self) -> int:
        """Tokens that belong to a document."""
        return int(self.cu_seqlens[-1])

    @property
    def loss_tokens(self) -> int:
        """Tokens that have a target."""
        return int((self.targets != IGNORE_INDEX).sum())

    @property
    def counted_rows(self) -> int:
        """Rows that the loss counts: those with a target whose weight is not zero."""
        return int(((self.targets != IGNORE_INDEX) & (self.token_weights != 0)).sum())


def assemble_pack(sample_ids: Sequence[tuple[int, int]], stores: Sequence[TokenStore], budget: int) -> PackedBatch:
    """Puts the samples (source, index) into one pack of `budget` tokens, in this order."""
    input_ids = np.zeros(budget, np.int64)
    targets = np.full(budget, IGNORE_INDEX, np.int64)
    token_weights = np.zeros(budget, np.float32)
    source_ids = np.zeros(budget, np.int32)
    cu_seqlens = np.zeros(len(sample_ids) + 1, np.int32)
    start = 0
    for number, (source, index) in enumerate(sample_ids):
        tokens, loss_mask, weight = stores[source].sample(index)
        end = start + tokens.size
        input_ids[start:end] = tokens
        # Position i predicts token i + 1: the mask of the predicted token decides, the last token predicts nothing.
        predicted = loss_mask[1:].astype(bool)
        targets[start : end - 1] = np.where(predicted, tokens[1:], IGNORE_INDEX)
        token_weights[start : end - 1] = predicted * np.float32(weight)
        source_ids[start:end] = source
        cu_seqlens[number + 1] = start = end
    return PackedBatch(
        torch.from_numpy(input_ids),
        torch.from_numpy(targets),
        torch.from_numpy(token_weights),
        torch.from_numpy(source_ids),
        torch.from_numpy(cu_seqlens),
        list(sample_ids),
    )


def check_fits(stores: Sequence[TokenStore], budget: int) -> None:
    """Raises a DataError that names the longest sample if it has more tokens than a pack."""
    for store in stores:
        longest = int(store.token_counts.argmax())
        length = int(store.token_counts[longest])
        if length > budget:
            file, line = store.origin(longest)
            raise DataError(
                f"{file}:{line}: the sample has {length} tokens, expected at most the pack's budget of {budget}; raise "
                "the budget, or build the store with max_length at most the budget"
            )
