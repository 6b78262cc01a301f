"""The public ops of forge_core. One op, one name: see docs/architecture.md for the five places of each."""

from .linear_token_logprobs import linear_token_logprobs
from .pack import PackPlan, TokenMixer, pack_sequences
from .registry import available_backends
from .rms_norm import rms_norm
from .weighted_linear_cross_entropy import MixingLoss, weighted_linear_cross_entropy

__all__ = [
    "MixingLoss",
    "PackPlan",
    "TokenMixer",
    "available_backends",
    "linear_token_logprobs",
    "pack_sequences",
    "rms_norm",
    "weighted_linear_cross_entropy",
]
