"""Rows of logits to log-probability and entropy of their tokens, and their gradient: that of both given, or of a policy
objective whose ratio belongs to the token. In Triton, or by a CUDA kernel of csrc/cuda that keeps a row in the shared
memory of a cluster of blocks. Both read a row once, but for the objective with its gradient, which Triton sweeps twice.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .linear_head import CountedRows, clusters_of
from .softmax_row import clear_row, exp, row_sums, tile_of, write_gradient

OBJECTIVES = {"clip": 0, "sequence_clip": 0, "cispo": 1, "reinforce": 2}
CISPO, REINFORCE = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def clipped(ratio, advantage, lower, upper, OBJECTIVE: tl.constexpr):
    """The ratio inside its bounds; whether the lower, the upper bound replaces it."""
    below = ratio < lower
    above = ratio > upper
    bounded = tl.where(below, lower, tl.where(above, upper, ratio))
    if OBJECTIVE == REINFORCE:
        return bounded, below & (ratio < 0), above & (ratio < 0)  # no ratio, no bounds
    elif OBJECTIVE == CISPO:
        return bounded, below & (advantage != 0), above & (advantage != 0)
    else:
        # -min(ratio * A, bounded * A): the bound holds only where it makes the objective smaller.
        return bounded, below & (advantage < 0), above & (advantage > 0)


@triton.jit
def slope(log_ratio, advantage, lower, upper, OBJECTIVE: tl.constexpr):
    """d(policy objective)/d(log-ratio); without a gradient through the ratio, d(policy objective)/d(logprob)."""
    ratio = exp(log_ratio)
    bounded, low, high = clipped(ratio, advantage, lower, upper, OBJECTIVE)
    if OBJECTIVE == REINFORCE:
        return -advantage
    elif OBJECTIVE == CISPO:
        return -bounded * advantage
    else:
        return tl.where(low | high, 0.0, -ratio * advantage)


@triton.jit
def _rows(
    z_RV, dz_RV, rows_T, count_ptr, targets_T, advantages_T, old_T, ref_T, weights_T, inverse_ptr,
    logprob_T, entropy_T, log_ratio_T,
    first, vocab, stride, dz_stride, lower, upper, kl_coef, entropy_coef, softcap, scale,
    OBJECTIVE: tl.constexpr, OLD: tl.constexpr, REF: tl.constexpr, WEIGHTS: tl.constexpr, GRADIENT: tl.constexpr,
    SOFTCAP: tl.constexpr, SCALED: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One row of an objective by token."""
    row = first + tl.program_id(0)
    z_V = z_RV + tl.program_id(0).to(tl.int64) * stride
    dz_V = dz_RV + tl.program_id(0).to(tl.int64) * dz_stride
    if row < tl.load(count_ptr):
        token = tl.load(rows_T + row)
        target = tl.load(targets_T + token).to(tl.int32)
        row_max, log_sum, exact_logprob, _, _, entropy = row_sums(
            z_V, vocab, target, softcap, scale, SOFTCAP, SCALED, False, True, UNROLL, LANES
        )
        logprob = exact_logprob.to(tl.float32)
        log_ratio = 0.0 * row_max  # the old policy is this one
        if OLD:
            exact_log_ratio = exact_logprob - tl.load(old_T + token).to(tl.float64)
            log_ratio = exact_log_ratio.to(tl.float32)
            tl.store(log_ratio_T + token, exact_log_ratio)
        else:
            tl.store(log_ratio_T + token, 0.0)
        tl.store(logprob_T + token, exact_logprob)
        tl.store(entropy_T + token, entropy)
        if GRADIENT:
            g = slope(log_ratio, tl.load(advantages_T + token), lower, upper, OBJECTIVE)
            if REF:
                g += kl_coef * (1.0 - exp(tl.load(ref_T + token) - logprob))
            weight = tl.load(inverse_ptr).to(tl.float32)
            if WEIGHTS:
                weight *= tl.load(weights_T + token)
            g *= weight
            h = -weight * entropy_coef
            # As in linear_token_logprobs: d logprob / dy = onehot - p, d entropy / dy = -p * (log p + entropy).
            write_gradient(
                z_V, dz_V, vocab, target, row_max, log_sum.to(tl.float32), g, -(g + h * entropy), -h, 0.0,
                softcap, scale, SOFTCAP, SCALED, True, UNROLL, LANES,
            )  # fmt: skip
    elif GRADIENT:
        clear_row(dz_V, vocab, UNROLL * LANES)


@triton.jit
def _forward(
    z_RV, rows_T, count_ptr, targets_T, logprob_T, entropy_T, softmax_2T, first, tokens, vocab, stride, softcap, scale,
    SOFTCAP: tl.constexpr, SCALED: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = first + tl.program_id(0)
    if row < tl.load(count_ptr):
        z_V = z_RV + tl.program_id(0).to(tl.int64) * stride
        token = tl.load(rows_T + row)
        target = tl.load(targets_T + token).to(tl.int32)
        row_max, log_sum, logprob, _, _, entropy = row_sums(
            z_V, vocab, target, softcap, scale, SOFTCAP, SCALED, False, True, UNROLL, LANES
        )
        tl.store(logprob_T + token, logprob)
        tl.store(entropy_T + token, entropy)
        # Kept apart: their sum would lose what makes p = 1 exact.
        tl.store(softmax_2T + token, row_max)
        tl.store(softmax_2T + tokens + token, log_sum.to(tl.float32))


@triton.jit
def _backward(
    z_RV, dz_RV, rows_T, count_ptr, targets_T, dlogprob_T, dentropy_T, entropy_T, softmax_2T,
    first, tokens, vocab, stride, dz_stride, softcap, scale,
    SOFTCAP: tl.constexpr, SCALED: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = first + tl.program_id(0)
    dz_V = dz_RV + tl.program_id(0).to(tl.int64) * dz_stride
    if row < tl.load(count_ptr):
        z_V = z_RV + tl.program_id(0).to(tl.int64) * stride
        token = tl.load(rows_T + row)
        target = tl.load(targets_T + token).to(tl.int32)
        g = tl.load(dlogprob_T + token)
        h = tl.load(dentropy_T + token)
        # With p = softmax(y) and its entropy H: d logprob / dy = onehot - p, dH / dy = -p * (log p + H).
        write_gradient(
            z_V, dz_V, vocab, target, tl.load(softmax_2T + token), tl.load(softmax_2T + tokens + token), g,
            -(g + h * tl.load(entropy_T + token)), -h, 0.0, softcap, scale, SOFTCAP, SCALED, True, UNROLL, LANES,
        )  # fmt: skip
    else:
        clear_row(dz_V, vocab, UNROLL * LANES)


@dataclass(frozen=True)
class Policy:
    """A policy objective by token: inputs of each token, bounds of the ratio, coefficients."""

    objective: int  # of OBJECTIVES
    advantages: Tensor
    inverse: Tensor  # 1 / normalizer
    old: Tensor | None = None
    ref: Tensor | None = None
    weights: Tensor | None = None
    lower: float = 1.0
    upper: float = 1.0
    kl_coef: float = 0.0
    entropy_coef: float = 0.0

    @property
    def coefficients(self) -> tuple[float, float, float, float]:
        """As the kernels take them."""
        return self.lower, self.upper, self.kl_coef, self.entropy_coef

    @property
    def given(self) -> dict[str, bool]:
        """Which inputs there are, as Triton's kernels take it."""
        return {"OLD": self.old is not None, "REF": self.ref is not None, "WEIGHTS": self.weights is not None}


class TritonRows:
    """Sweeps over rows in the second-level cache.

    Attributes:
        logprob: float64 [tokens], 0 where a token does not count.
        entropy: float32 [tokens], likewise.
        softmax: float32 [2, tokens], row maximum and log of the sum, which a backward of its own needs.
    """

    def __init__(
        self, counted: CountedRows, targets: Tensor, vocab: int, temperature: float, softcap: float,
        entropy: Tensor | None = None, softmax: Tensor | None = None,
    ) -> None:  # fmt: skip
        """`entropy` and `softmax`: of an earlier forward, for `gradient` alone."""
        self._counted, self._targets, self._vocab = counted, targets, vocab
        self._temperature, self._softcap = temperature, softcap
        tokens = targets.numel()
        self.logprob = targets.new_zeros(tokens if entropy is None else 0, dtype=torch.float64)
        self.entropy = targets.new_zeros(tokens, dtype=torch.float32) if entropy is None else entropy
        self.softmax = targets.new_zeros((2, tokens), dtype=torch.float32) if softmax is None else softmax

    def _cap(self) -> tuple[float, float]:
        return self._softcap, 1.0 / self._temperature

    def _flags(self) -> dict[str, int]:
        return {"SOFTCAP": self._softcap > 0, "SCALED": self._temperature != 1, **tile_of(self._vocab)}

    def measure(self, z: Tensor, first: int) -> None:
        """Log-probability and entropy of rows `first` and on of those that count."""
        _forward[(z.shape[0],)](
            z, self._counted.rows, self._counted.count, self._targets, self.logprob, self.entropy, self.softmax,
            first, self._targets.numel(), self._vocab, z.stride(0), *self._cap(), **self._flags(),
        )  # fmt: skip

    def gradient(self, z: Tensor, dz: Tensor, first: int, dlogprob: Tensor, dentropy: Tensor) -> None:
        """dz, which may lie over z, of rows that were measured before, from the gradients of what was measured."""
        _backward[(z.shape[0],)](
            z, dz, self._counted.rows, self._counted.count, self._targets, dlogprob, dentropy, self.entropy,
            self.softmax, first, self._targets.numel(), self._vocab, z.stride(0), dz.stride(0), *self._cap(),
            **self._flags(),
        )  # fmt: skip

    def objective(self, z: Tensor, dz: Tensor | None, first: int, policy: Policy, log_ratio: Tensor) -> None:
        """`measure`, the log-ratio in float64, and with dz the gradient of the objective."""
        gradient, dz = dz is not None, z if dz is None else dz
        _rows[(z.shape[0],)](
            z, dz, self._counted.rows, self._counted.count, self._targets, policy.advantages, policy.old, policy.ref,
            policy.weights, policy.inverse, self.logprob, self.entropy, log_ratio, first, self._vocab, z.stride(0),
            dz.stride(0), *policy.coefficients, *self._cap(), OBJECTIVE=policy.objective, GRADIENT=gradient,
            **policy.given, **self._flags(),
        )  # fmt: skip


class CudaRows(TritonRows):
    """Clusters of blocks keep rows in their shared memory; a gradient of its own reduces its row again there."""

    def measure(self, z: Tensor, first: int) -> None:
        """As of TritonRows; leaves `softmax` alone."""
        self._run(z, None, first, (self.logprob, self.entropy, None), (None, None), None)

    def gradient(self, z: Tensor, dz: Tensor, first: int, dlogprob: Tensor, dentropy: Tensor) -> None:
        """As of TritonRows."""
        self._run(z, dz, first, (None, None, None), (dlogprob, dentropy), None)

    def objective(self, z: Tensor, dz: Tensor | None, first: int, policy: Policy, log_ratio: Tensor) -> None:
        """As of TritonRows."""
        self._run(z, dz, first, (self.logprob, self.entropy, log_ratio), (None, None), policy)

    def _run(
        self, z: Tensor, dz: Tensor | None, first: int, results: tuple[Tensor | None, ...],
        gradients: tuple[Tensor | None, ...], policy: Policy | None,
    ) -> None:  # fmt: skip
        inputs: tuple[Tensor | None, ...] = (None,) * 5
        objective, coefficients = 0, (1.0, 1.0, 0.0, 0.0)
        if policy is not None:
            inputs = policy.advantages, policy.old, policy.ref, policy.weights, policy.inverse
            objective, coefficients = policy.objective, policy.coefficients
        torch.ops.forge.token_logprob_rows(
            z, dz, self._counted.rows, self._counted.count, self._targets, *results, *gradients, *inputs, objective,
            *coefficients, self._softcap, self._temperature, first, *clusters_of(self._vocab, z.device),
        )  # fmt: skip
