"""Clipped policy gradients over a linear head, with KL and entropy terms, without the full logits."""

import math
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from . import reference
from .library import implement_on_gpu
from .linear_head import (
    check_counted_rows,
    check_linear_head,
    check_temperature,
    check_token_values,
    fake_gradients,
    head_cuda_reasons,
    head_triton_reasons,
    normalizer_tensor,
    register_loss,
)
from .registry import Op, cpp_reasons, no_reasons

OP = Op("policy_gradient_loss")

Objective = Literal["clip", "sequence_clip", "cispo", "reinforce"]


class PolicyLoss(NamedTuple):
    """A policy-gradient loss and what it saw on the way; `loss` alone is differentiable.

    A token counts when its target is not `ignore_index` and its weight is not zero. Sums run over the tokens that
    count, without their weights: they add up over packs and ranks, and divided by `token_count` they are means.
    """

    loss: Tensor  # scalar float32
    token_count: Tensor  # scalar int64
    clipped_low: Tensor  # scalar int64, tokens whose ratio was replaced by 1 - clip_low
    clipped_high: Tensor  # scalar int64, tokens whose ratio was replaced by 1 + clip_high
    entropy_sum: Tensor  # scalar float32, nats
    kl_sum: Tensor  # scalar float32, k3 estimate of KL(policy || reference), 0 without ref_logprobs
    old_kl_sum: Tensor  # scalar float32, k3 estimate of KL(old policy || policy), 0 without old_logprobs
    ratio_sum: Tensor  # scalar float32, of the ratios that the objective uses
    max_abs_log_ratio: Tensor  # scalar float32, of the same ratios; 0 where no token counts


def policy_gradient_loss(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None = None,
    *,
    objective: Objective = "clip",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    token_weights: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    counted_rows: int | None = None,
    backend: str = "auto",
) -> PolicyLoss:
    """Policy-gradient loss of `softmax(hidden @ lm_head.T / temperature)` for sampled tokens with given advantages.

    With l_i the log-probability of target i (logits softcapped before the temperature: c * tanh(z / c)), H_i the
    entropy of its distribution, A_i the advantage, r_i = e^(l_i - old_i) and b_i = clamp(r_i, 1 - clip_low,
    1 + clip_high):

        loss = sum_i w_i * (f_i + kl_coef * k_i - entropy_coef * H_i) / normalizer
        k_i = e^(ref_i - l_i) - (ref_i - l_i) - 1      (k3: Schulman, "Approximating KL divergence", 2020)

    | objective       | f_i                         | from                                                           |
    |-----------------|-----------------------------|----------------------------------------------------------------|
    | "clip"          | -min(r_i A_i, b_i A_i)      | PPO (arXiv 1707.06347), GRPO (2402.03300), DAPO (2503.14476)   |
    | "sequence_clip" | the same                    | GSPO (2507.18071): r_i is the geometric mean over the sequence |
    | "cispo"         | -stop_gradient(b_i) A_i l_i | CISPO of MiniMax-M1 (2506.13585)                               |
    | "reinforce"     | -A_i l_i                    | REINFORCE (Williams 1992); no ratio                            |

    GRPO averages each answer, then the answers: token_weights = 1 / length of the answer, normalizer = their number.
    DAPO averages all tokens alike (no weights) and clips higher: clip_low=0.2, clip_high=0.28. GSPO: weights as in
    GRPO, clip_low=3e-4, clip_high=4e-4. CISPO: no lower bound (clip_low=1). Answers of a group without any difference
    in reward: weight 0 (they cost no matmul) and a normalizer that still counts them.

    Computed in float32 (float64 for float64 inputs). Rows that are ignored or have weight zero do not reach any matmul
    and get zero gradients. Differentiable once. All but "reference" compute the gradients together with the loss, in
    two matmuls with a frozen head and three with a trained one, so call them under no_grad where they are not wanted.
    For "sequence_clip" it is one matmul more, unless the head is frozen and entropy_coef is 0.

    Args:
        hidden: [tokens, hidden], after the final norm.
        lm_head: [vocab, hidden], dtype of hidden; no gradient is computed for a frozen head.
        targets: int64 [tokens], the sampled tokens, below vocab or `ignore_index`.
        advantages: float32 [tokens], finite.
        old_logprobs: float32 [tokens] in nats, finite: of the policy that sampled, at this temperature. None: it is
            this very policy, and every ratio is 1.
        ref_logprobs: float32 [tokens] in nats, finite: of the reference policy. Needed where kl_coef is not 0;
            otherwise only reported.
        objective: see above.
        clip_low: 0 <= clip_low <= 1; 1 is no lower bound.
        clip_high: >= 0; math.inf is no upper bound.
        kl_coef: factor of k3, >= 0.
        entropy_coef: factor of the entropy bonus; negative values lower the entropy.
        temperature: > 0; divides the logits.
        softcap: c > 0 of the logits' softcap, None for no softcap.
        token_weights: w, float32 [tokens], finite and >= 0; None is all ones.
        normalizer: number or one-element tensor >= 0 that the sum is divided by, e.g. the weight of the whole global
            batch; None is the sum of the weights of the rows that count. Where it is 0 (nothing counts) the loss and
            all gradients are 0.
        cu_seqlens: int32 [sequences + 1], for "sequence_clip" only: every token that counts lies in a sequence, and its
            sequence's tokens that count form the mean.
        ignore_index: targets with this value do not count.
        counted_rows: a bound for the number of rows that count, where the caller knows one without asking the GPU: the
            matmuls of "cuda" and "triton" then go over that many rows only, instead of all. It fails where more count.
        backend: "auto" tries "cpp" (CPU), "cuda" (GPU from compute capability 9.0), "triton" (GPU; all of them over
            chunks of rows, no full logits; "cuda" is "triton" but for its row kernel), then "reference".

    Returns:
        PolicyLoss: the loss (float32) and what is reported.

    Raises:
        ValueError: shapes or dtypes do not match, an option or a value in a row that counts is out of range (the
            message names it), or the named backend cannot take the inputs.
    """
    tokens = check_linear_head(hidden, lm_head, targets, softcap)
    check_token_values("advantages", advantages, tokens)
    check_token_values("old_logprobs", old_logprobs, tokens)
    check_token_values("ref_logprobs", ref_logprobs, tokens)
    check_token_values("token_weights", token_weights, tokens)
    _check_options(objective, clip_low, clip_high, kl_coef, entropy_coef, temperature)
    if kl_coef != 0 and ref_logprobs is None:
        raise ValueError(f"ref_logprobs: got None with kl_coef {kl_coef}, expected float32 [{tokens}]")
    if (cu_seqlens is None) == (objective == "sequence_clip"):
        got, expected = ("None", "int32 [sequences + 1]") if cu_seqlens is None else ("a tensor", "None")
        raise ValueError(f"cu_seqlens: got {got} with objective {objective!r}, expected {expected}")
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or not len(cu_seqlens) or cu_seqlens.dtype != torch.int32):
        got = f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        raise ValueError(f"cu_seqlens: got {got}, expected int32 [sequences + 1]")
    check_counted_rows(counted_rows)
    total = normalizer_tensor(normalizer, hidden)
    run = OP.select(backend, hidden, lm_head)
    loss, counts, sums = run(
        hidden,
        lm_head,
        targets,
        advantages,
        old_logprobs,
        ref_logprobs,
        token_weights,
        cu_seqlens,
        total,
        objective,
        clip_low,
        clip_high,
        kl_coef,
        entropy_coef,
        temperature,
        softcap,
        ignore_index,
        counted_rows=counted_rows,
    )
    return PolicyLoss(loss, *counts.unbind(), *sums.unbind())


def _check_options(
    objective: str, clip_low: float, clip_high: float, kl_coef: float, entropy_coef: float, temperature: float
) -> None:
    if objective not in get_args(Objective):
        raise ValueError(f"objective: got {objective!r}, expected one of {list(get_args(Objective))}")
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low: got {clip_low}, expected 0 <= clip_low <= 1")
    if not clip_high >= 0:
        raise ValueError(f"clip_high: got {clip_high}, expected a number >= 0")
    if not (kl_coef >= 0 and math.isfinite(kl_coef)):
        raise ValueError(f"kl_coef: got {kl_coef}, expected a finite number >= 0")
    if not math.isfinite(entropy_coef):
        raise ValueError(f"entropy_coef: got {entropy_coef}, expected a finite number")
    check_temperature(temperature)


def _run(
    ops: Any, hidden: Tensor, lm_head: Tensor, *rest: Tensor | float | str | None, counted_rows: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    *options, softcap, ignore_index = rest
    grad = torch.is_grad_enabled()
    return ops.policy_gradient_loss(
        hidden,
        lm_head,
        *options,
        softcap or 0.0,
        ignore_index,
        counted_rows,
        grad and hidden.requires_grad,
        grad and lm_head.requires_grad,
    )[:3]


OP.register("cpp", partial(_run, torch.ops.forge), cpp_reasons)
OP.register("cuda", partial(_run, torch.ops.forge), head_cuda_reasons)
OP.register("triton", partial(_run, torch.ops.forge_triton), head_triton_reasons)
OP.register("reference", reference.policy_gradient_loss, no_reasons)


def _fake(hidden: Tensor, lm_head: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(3, dtype=torch.int64),
        hidden.new_empty(5, dtype=torch.float32),
        *fake_gradients(hidden, lm_head, *rest[-2:]),
    )


register_loss("policy_gradient_loss", _fake, gpu="policy_gradient_loss")
implement_on_gpu("policy_gradient_loss", "policy_gradient_loss", cuda_rows=True)
