"""One plain-torch definition per op: the oracle of every test, and the backend for any device and dtype.

Written to be read. Each runs in float64 for float64 inputs and in float32 otherwise, and rounds to the inputs' dtype
at the end.
"""

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a reference computes: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * (weight + weight_offset)` over the last dimension."""
    wide = x.to(compute_dtype(x))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd * (weight.to(wide.dtype) + weight_offset)).to(x.dtype)
