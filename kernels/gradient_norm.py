"""The global norm of many gradients."""

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from . import library, reference
from .library import register_op
from .registry import Op, no_reasons

OP = Op("gradient_norm")


def gradient_norm(gradients: Sequence[Tensor], *, backend: str = "auto") -> Tensor:
    """Square root of the sum of squares of all values of all gradients.

    Summed in float64 in a fixed order: it repeats bit for bit, on the CPU with any number of threads. Nothing waits for
    the device. Shards of one gradient on several ranks: square the norms, sum them over the ranks, take the root.

    Args:
        gradients: any shapes, float32, bfloat16, float16 or float64, also mixed; no tensors give 0.
        backend: "auto" tries "cpp" (CPU), "cuda", then "reference".

    Returns:
        Scalar, float32 (float64 where a gradient is).

    Raises:
        ValueError: the named backend cannot take the inputs.
    """
    if not gradients:
        return torch.zeros(())
    gradients = list(gradients)
    return OP.select(backend, gradients)(gradients)


def list_reasons(device: str, tensors: Iterable[Tensor]) -> list[str]:
    """What keeps the ops over lists of tensors on "cpu" (C++) or "cuda" from taking these."""
    # Hundreds of tensors in every step: so each question is asked of the set of what they are (device.type is slow).
    tensors = list(tensors)
    reasons = [library.CUDA_LIBRARY_MISSING] if device == "cuda" and not library.cuda_library_loaded() else []
    wrong = [str(other) for other in {tensor.device for tensor in tensors} if other.type != device]
    if wrong:
        reasons.append(f"runs on {device}, got tensors on {', '.join(sorted(wrong))}")
    if foreign := {tensor.dtype for tensor in tensors} - {torch.float32, torch.bfloat16, torch.float16}:
        reasons.append(f"takes float32, bfloat16 and float16, got {', '.join(sorted(map(str, foreign)))}")
    if not set(map(type, tensors)) <= {Tensor, torch.nn.Parameter}:
        reasons.append("takes dense tensors, not sharded ones: pass what DTensor.to_local() gives")
    return reasons


def _run(gradients: list[Tensor]) -> Tensor:
    return torch.ops.forge.gradient_norm(gradients)


OP.register("cpp", _run, partial(list_reasons, "cpu"))
OP.register("cuda", _run, partial(list_reasons, "cuda"))
OP.register("reference", reference.gradient_norm, no_reasons)


def _fake(gradients: list[Tensor]) -> Tensor:
    return gradients[0].new_empty((), dtype=torch.float32)


register_op("gradient_norm", _fake)
