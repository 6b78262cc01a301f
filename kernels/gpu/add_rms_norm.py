"""add_rms_norm in Triton: total = x + residual, y = rms_norm(total); the kernels are those of rms_norm.

Forward reads two tensors and writes two; backward reads three and writes one. An addition and a norm on their own move
five and, with the addition of their gradients, six.
"""

from functools import partial

import torch
from torch import Tensor

from .rms_norm import launch_backward, launch_forward
from .workload import Workload, meta


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the forward kernel; results as the op's schema has them."""
    return launch_forward(x, residual, weight, eps, weight_offset)


def add_rms_norm_backward(
    dy: Tensor, dtotal: Tensor, total: Tensor, weight: Tensor, rstd: Tensor, weight_offset: float, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    """Launches the backward kernels; results as the op's schema has them."""
    return launch_backward(dy, dtotal, total, weight, rstd, weight_offset, need_dweight)


def workloads() -> list[Workload]:
    """Hidden states of SmolLM2-135M, Llama-3-8B and a 70B model."""
    listed = []
    for d in (576, 4096, 8192):
        x, w, rstd = meta(8192, d), meta(d), meta(8192, dtype=torch.float32)
        forward = partial(add_rms_norm, x, x, w, 1e-6, 0.0)
        listed.append(Workload(f"add_rms_norm: forward 8192 x {d}", forward, 8 * 8192 * d))
        for need, what in ((False, "backward"), (True, "backward with dweight")):
            backward = partial(add_rms_norm_backward, x, x, x, w, rstd, 0.0, need)
            listed.append(Workload(f"add_rms_norm: {what} 8192 x {d}", backward, 8 * 8192 * d))
    return listed
