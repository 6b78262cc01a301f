"""What happened since the last log line, kept on the device and read in one go."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from forge_core.kernels import MixingLoss

from .sources import Source

SampleIds = list[tuple[int, int]]


class NonFiniteError(RuntimeError):
    """The loss or the gradient became infinite or not a number; the message names step and samples."""


@dataclass
class _Step:
    step: int
    sample_ids: list[SampleIds]
    losses: list[MixingLoss]
    grad_norm: Tensor


@dataclass
class Window:
    """Collects steps without waiting for the device; `read` waits once.

    sources: the sources of the run, in the order of the loss's source ids.
    """

    sources: Sequence[Source]
    steps: list[_Step] = field(default_factory=list)

    def add(self, step: int, sample_ids: list[SampleIds], losses: list[MixingLoss], grad_norm: Tensor) -> None:
        """Keep a step's device values and the samples of each of its packs."""
        detached = [MixingLoss(*(part.detach() for part in loss)) for loss in losses]
        self.steps.append(_Step(step, sample_ids, detached, grad_norm.detach()))

    def read(self) -> dict[str, Any]:
        """Return loss, grad_norm and the values per source of the kept steps, and forget them.

        loss: weighted mean over the window's tokens; grad_norm: the largest of the window, before clipping; sources:
        name -> loss, accuracy, loss_tokens (None where the source had no token).

        Raises:
            NonFiniteError: a loss or a gradient norm is not finite; names the first such step and its samples.
        """
        table = self._to_host()
        self._require_finite(table)
        nll, weight, count, correct = (table[:, :, part].sum(dim=(0, 1)) for part in range(1, 5))
        sources = {}
        for index, source in enumerate(self.sources):
            tokens = int(count[index])
            sources[source.name] = {
                "loss": float(nll[index] / weight[index]) if weight[index] > 0 else None,
                "accuracy": float(correct[index] / tokens) if tokens else None,
                "loss_tokens": tokens,
            }
        line = {
            "loss": float(nll.sum() / weight.sum()) if weight.sum() > 0 else 0.0,
            "grad_norm": float(table[:, 0, 5, 0].max()),
            "sources": sources,
        }
        self.steps.clear()
        return line

    def _to_host(self) -> Tensor:
        """float64 [steps, packs, 6, sources]: loss and gradient norm (repeated), and the four statistics between."""
        width = len(self.sources)
        rows = [
            torch.stack(
                [
                    loss.loss.double().expand(width),
                    loss.weighted_nll.double(),
                    loss.weight_sum.double(),
                    loss.token_count.double(),
                    loss.correct.double(),
                    step.grad_norm.double().expand(width),
                ]
            )
            for step in self.steps
            for loss in step.losses
        ]
        return torch.stack(rows).view(len(self.steps), -1, 6, width).cpu()

    def _require_finite(self, table: Tensor) -> None:
        for step, values in zip(self.steps, table, strict=True):
            bad_packs = [pack for pack, loss in enumerate(values[:, 0, 0].tolist()) if not math.isfinite(loss)]
            norm = float(values[0, 5, 0])
            if not bad_packs and math.isfinite(norm):
                continue
            what = "the loss" if bad_packs else f"the gradient (norm {norm})"
            packs = bad_packs or range(len(step.sample_ids))
            samples = [sample for pack in packs for sample in step.sample_ids[pack]]
            raise NonFiniteError(
                f"step {step.step}: {what} is not finite, training stopped before anything was saved. Samples of "
                f"{'the packs' if bad_packs else 'the step'}: {self._origins(samples)}. Look at these rows; if they "
                "are in order, lower training.learning_rate or lora.lora_plus_ratio, or use model.dtype float32; then "
                "resume"
            )

    def _origins(self, samples: SampleIds, shown: int = 8) -> str:
        places = [f"{file}:{line}" for file, line in (self.sources[s].store.origin(i) for s, i in samples)]
        places = list(dict.fromkeys(places))
        more = f" and {len(places) - shown} more" if len(places) > shown else ""
        return ", ".join(places[:shown]) + more
