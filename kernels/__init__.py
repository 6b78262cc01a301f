"""The public ops of forge_core. One op, one name: see docs/architecture.md for the five places of each."""

from .registry import available_backends
from .rms_norm import rms_norm

__all__ = ["available_backends", "rms_norm"]
