"""The learning rate of every step: linear warmup, a plateau, a decay to the minimum."""

import math
from dataclasses import dataclass
from typing import Literal

from forge_core.recipe import TrainingOptions


@dataclass(frozen=True)
class Schedule:
    """Learning rate as a function of the step, steps counted from 1.

    Rises linearly to `peak`, reached at step `warmup`; stays there `constant` steps; then falls to `minimum`, reached
    at step `total`: along half a cosine (SGDR, arXiv 1608.03983, equation 5, one period) or a line.
    """

    peak: float
    minimum: float
    warmup: int
    constant: int
    total: int
    decay: Literal["cosine", "linear"]

    @classmethod
    def of(cls, training: TrainingOptions) -> "Schedule":
        """The schedule of a recipe."""
        return cls(
            peak=training.learning_rate,
            minimum=training.min_lr,
            warmup=training.warmup_steps,
            constant=training.constant_steps,
            total=training.max_steps,
            decay=training.decay,
        )

    def __call__(self, step: int) -> float:
        """Learning rate of `step`; after the last step it stays at the minimum.

        Raises:
            ValueError: step < 1.
        """
        if step < 1:
            raise ValueError(f"step: got {step}, steps are counted from 1")
        if step < self.warmup:
            return self.peak * step / self.warmup
        plateau_end = self.warmup + self.constant
        if step <= plateau_end:
            return self.peak
        progress = min(1.0, (step - plateau_end) / (self.total - plateau_end)) if self.total > plateau_end else 1.0
        remaining = 1.0 - progress if self.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.minimum + (self.peak - self.minimum) * remaining
