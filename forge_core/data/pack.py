"""Step 7, pack: samples side by side in one row of a fixed number of tokens, each its own document."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

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


class AnswerRows(NamedTuple):
    """Which row of a pack predicts which token of the documents that continue others.

    Attributes:
        rows: int64 [n], the row whose hidden state predicts the token.
        tokens: int64 [n], the row of the token: where per-token values of the pack lie.
        cu_seqlens: int32 [documents + 1], which of the n belong to each document; none to one that continues no other.
    """

    rows: torch.Tensor
    tokens: torch.Tensor
    cu_seqlens: torch.Tensor


def answer_rows(cu_seqlens: torch.Tensor, parents: torch.Tensor) -> AnswerRows:
    """Rows and tokens for a loss over the answers of a pack that holds their prompt once.

    A token is predicted by the row before it, the first one of an answer by the last row of the prompt: once for each
    answer, so that this row has several targets and the loss takes gathered rows. With a prompt in rows 0 to 2 and two
    answers, cu_seqlens [0, 3, 5, 6] and parents [-1, 0, 0], the result is rows 2 3 2, tokens 3 4 5, cu_seqlens 0 0 2 3:

        hidden = model(input_ids, cu_seqlens, parents=parents)
        answers = answer_rows(cu_seqlens, parents)
        policy_gradient_loss(
            hidden[answers.rows], model.lm_head_weight, input_ids[answers.tokens], advantages[answers.tokens],
            old_logprobs[answers.tokens], objective="sequence_clip", cu_seqlens=answers.cu_seqlens)

    Tokens without loss, such as those of a tool in a longer conversation, are left out by a mask over `tokens`.

    Args:
        cu_seqlens: int32 [documents + 1] of the pack.
        parents: int32 [documents], the document that each one continues, before it, or -1.

    Returns:
        AnswerRows on the CPU, documents in their order. A first token behind nothing but empty documents is left out.
    """
    rows, tokens, counts = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [0]
    last_rows: list[int] = []  # of each document and what it continues; -1 for none
    for (begin, end), parent in zip(pairwise(cu_seqlens.tolist()), parents.tolist(), strict=True):
        before = last_rows[parent] if parent >= 0 else -1
        last_rows.append(end - 1 if end > begin else before)
        first = end if parent < 0 else begin + (before < 0)
        tokens.append(np.arange(first, end))
        rows.append(np.where(tokens[-1] == begin, before, tokens[-1] - 1))
        counts.append(tokens[-1].size)
    return AnswerRows(
        torch.from_numpy(np.concatenate(rows)),
        torch.from_numpy(np.concatenate(tokens)),
        torch.from_numpy(np.cumsum(counts, dtype=np.int32)),
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
