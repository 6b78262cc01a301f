"""Answers to one prompt in one pack, the prompt computed once: equal to one row per answer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from forge_core.data import answer_rows
from forge_core.kernels import PackPlan, linear_token_logprobs, policy_gradient_loss
from forge_core.model import CausalLM, LoraConfig, adapter_parameters, load_model

from .test_lora import with_adapters
from .tiny import VARIANTS, documents, save_peer

# Two groups: a prompt of 9 with answers of 6, 1, none and 4 tokens, one of which goes on for 3; a prompt of 5 with two.
LENGTHS, PARENTS = (9, 6, 1, 0, 4, 3, 5, 2, 7), [-1, 0, 0, 0, 0, 4, -1, 6, 6]


def _separate(input_ids: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A row per document that continues another, behind its ancestors: ids, cu_seqlens, and of the tokens that are the
    document's own their rows there and in the shared pack."""
    bounds, seen, ids, lengths, own, shared = cu_seqlens.tolist(), [], [], [0], [], []
    for document, parent in enumerate(PARENTS):
        rows = list(range(bounds[document], bounds[document + 1]))
        seen.append([*seen[parent], *rows] if parent >= 0 else rows)
        if parent >= 0:
            start = sum(lengths) + len(seen[parent])
            own += range(start, start + len(rows))
            shared += rows
            lengths.append(len(seen[-1]))
            ids += seen[-1]
    return (
        input_ids[ids], torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), torch.tensor(own),
        torch.tensor(shared),
    )  # fmt: skip


def _gradients(model: CausalLM, loss: Tensor) -> dict[str, Tensor]:
    parameters = adapter_parameters(model)
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_hidden_states_equal_separate_rows(tmp_path: Path, name: str, planned: bool) -> None:
    save_peer(tmp_path, name)
    model = load_model(tmp_path, dtype=torch.float64)
    input_ids, cu_seqlens = documents(*LENGTHS)
    ids, separate, own, shared = _separate(input_ids, cu_seqlens)
    parents = torch.tensor(PARENTS, dtype=torch.int32)
    plan = PackPlan(cu_seqlens.numpy(), parents=parents.numpy()) if planned else None
    packed = model(torch.cat((input_ids, torch.tensor([5]))), cu_seqlens, parents=parents, plan=plan)
    torch.testing.assert_close(packed[shared], model(ids, separate)[own], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("objective", ["clip", "sequence_clip"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_policy_gradients_equal_those_of_separate_rows(dtype: torch.dtype, bound: float, objective: Any) -> None:
    # Adapters are float32 whatever the model is: so are their gradients.
    changes = {"model_type": "gemma2", "head_dim": 24, "sliding_window": 7, "attn_logit_softcapping": 5.0}
    model = with_adapters(LoraConfig(rank=4), dtype, **changes)
    input_ids, cu_seqlens = documents(*LENGTHS)
    parents = torch.tensor(PARENTS, dtype=torch.int32)
    generator = torch.Generator().manual_seed(2)
    advantages = torch.randn(len(input_ids), generator=generator)
    old_logprobs = -4.5 + 0.3 * torch.randn(len(input_ids), generator=generator)
    answers = answer_rows(cu_seqlens, parents)

    def loss(hidden: Tensor, tokens: Tensor) -> Tensor:
        return policy_gradient_loss(
            hidden, model.lm_head_weight, input_ids[tokens], advantages[tokens], old_logprobs[tokens],
            objective=objective, softcap=model.logit_softcap,
            cu_seqlens=answers.cu_seqlens if objective == "sequence_clip" else None,
        ).loss  # fmt: skip

    shared = loss(model(input_ids, cu_seqlens, parents=parents)[answers.rows], answers.tokens)
    ids, separate, own, tokens = _separate(input_ids, cu_seqlens)
    assert torch.equal(answers.tokens, tokens)
    expected = loss(model(ids, separate)[own - 1], tokens)
    torch.testing.assert_close(shared, expected, rtol=bound, atol=0)
    actual, wanted = _gradients(model, shared), _gradients(model, expected)
    assert len(actual) == 2 * 7 * 2
    for name, gradient in wanted.items():
        assert gradient.norm() > 0
        assert (actual[name] - gradient).norm() <= bound * gradient.norm(), name


def test_log_probabilities_equal_those_of_separate_rows() -> None:
    model = with_adapters(LoraConfig(rank=4))
    input_ids, cu_seqlens = documents(*LENGTHS)
    parents = torch.tensor(PARENTS, dtype=torch.int32)
    rows, tokens, _ = answer_rows(cu_seqlens, parents)
    shared = model(input_ids, cu_seqlens, parents=parents)[rows]
    ids, separate, own, _ = _separate(input_ids, cu_seqlens)
    expected = model(ids, separate)[own - 1]
    for a, b in zip(
        linear_token_logprobs(shared, model.lm_head_weight, input_ids[tokens]),
        linear_token_logprobs(expected, model.lm_head_weight, input_ids[tokens]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_answer_rows() -> None:
    def of(bounds: list[int], parents: list[int]) -> list[list[int]]:
        return [x.tolist() for x in answer_rows(*(torch.tensor(x, dtype=torch.int32) for x in (bounds, parents)))]

    assert of([0, 3, 5, 6], [-1, 0, 0]) == [[2, 3, 2], [3, 4, 5], [0, 0, 2, 3]]
    # An empty answer and what continues it; an answer to an empty prompt, whose first token nothing predicts.
    assert of([0, 2, 2, 4, 4, 6], [-1, 0, 1, -1, 3]) == [[1, 2, 4], [2, 3, 5], [0, 0, 0, 2, 2, 3]]
    assert of([0], []) == [[], [], [0]]


def test_plan_without_parents_is_refused() -> None:
    model = with_adapters(LoraConfig(rank=4))
    input_ids, cu_seqlens = documents(4, 3)
    parents = torch.tensor([-1, 0], dtype=torch.int32)
    with pytest.raises(ValueError, match="plan: got one made without parents"):
        model(input_ids, cu_seqlens, parents=parents, plan=PackPlan(cu_seqlens.numpy()))
