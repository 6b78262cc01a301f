"""Evaluation: loss and exact match on named sets, and what was forgotten."""

from .compare import compare_with_base
from .exact_match import evaluate_exact_match
from .forgetting import forgetting_summary, loss_change
from .loss import evaluate_loss
from .sets import PreparedSet, measure_sets, prepare_sets, without_predictions

__all__ = [
    "PreparedSet",
    "compare_with_base",
    "evaluate_exact_match",
    "evaluate_loss",
    "forgetting_summary",
    "loss_change",
    "measure_sets",
    "prepare_sets",
    "without_predictions",
]
