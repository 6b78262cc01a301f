"""Mean negative log-likelihood of a held-out set."""

import math

import torch

from forge_core.data import TokenStore, iterate_packs
from forge_core.kernels import weighted_linear_cross_entropy
from forge_core.model import CausalLM

from .mode import evaluating


def evaluate_loss(
    model: CausalLM, store: TokenStore, *, budget: int, limit: int | None = None
) -> dict[str, float | int]:
    """Mean negative log-likelihood per loss token of every sample of a store.

    Every loss token counts alike, whatever its sample's weight; documents do not see each other.

    Args:
        model: used in evaluation mode, given back in the mode it came in.
        store: the set.
        budget: tokens of a pack; affects speed and memory only.
        limit: use the first so many samples.

    Returns:
        nll (nats per token), perplexity = exp(nll), tokens (loss tokens counted), correct (share of tokens whose target
        is the most likely one, 0 to 1).

    Raises:
        DataError: a sample is longer than the budget (file:line).
    """
    device = model.lm_head_weight.device
    nll, tokens, correct = 0.0, 0, 0
    with evaluating(model):
        for pack in iterate_packs(store, budget, limit=limit):
            hidden = model(pack.input_ids.to(device), pack.cu_seqlens.to(device))
            loss = weighted_linear_cross_entropy(
                hidden,
                model.lm_head_weight,
                pack.targets.to(device),
                softcap=model.logit_softcap,
                counted_rows=pack.loss_tokens,
            )
            sums = torch.stack([loss.weighted_nll[0].double(), loss.token_count[0].double(), loss.correct[0].double()])
            pack_nll, pack_tokens, pack_correct = sums.tolist()
            nll += pack_nll
            tokens += int(pack_tokens)
            correct += int(pack_correct)
    mean = nll / tokens
    perplexity = math.exp(mean) if mean < 700 else math.inf
    return {"nll": mean, "perplexity": perplexity, "tokens": tokens, "correct": correct / tokens}
