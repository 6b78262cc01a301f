"""Rotary position tables, computed once per batch for each distinct rotary embedding of the model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import ModelConfig, RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Angular frequency of each rotated pair: `theta^(-2i / head_dim)`, stretched as `rope.kind` says.

    Evaluated in float32 on the CPU whatever the model's dtype and device: checkpoints are trained with these values,
    and at position 10^4 the last bit of a frequency already shows in the angle. Su et al. (arXiv 2104.09864),
    equation 15; "llama3": Llama 3.1 release, `low_freq_factor` and `high_freq_factor`.

    Returns:
        float32 [head_dim / 2].
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequencies = 1.0 / (rope.theta**exponent)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        context = rope.original_max_position_embeddings
        wavelength = 2 * math.pi / frequencies
        blend = (context / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blended = (1 - blend) * frequencies / rope.factor + blend * frequencies
        stretched = torch.where(wavelength > context / rope.low_freq_factor, frequencies / rope.factor, blended)
        return torch.where(wavelength < context / rope.high_freq_factor, frequencies, stretched)
    return frequencies


class RotaryTables:
    """The model's rotary embeddings as cos and sin of each token's position.

    Not a module: frequencies must stay float32 when the model is cast, and are not part of a checkpoint.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._frequencies = [inverse_frequencies(rope, config.head_dim) for rope in config.ropes]

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """For each of `config.ropes`: cos and sin, [tokens, head_dim / 2] for positions int64 [tokens].

        float64 for `dtype` float64, float32 otherwise.
        """
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        tables = []
        for index, frequencies in enumerate(self._frequencies):
            if frequencies.device != positions.device:
                frequencies = self._frequencies[index] = frequencies.to(positions.device)
            angles = (positions.to(torch.float32)[:, None] * frequencies).to(wide)
            tables.append((angles.cos(), angles.sin()))
        return tables
