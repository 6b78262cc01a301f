"""Weight-decomposed adapters (DoRA): what lora_linear's outputs are multiplied by when it is given a magnitude."""

import torch
from torch import Tensor

from .quantized import dense, nominal
from .reference import compute_dtype


def adapted_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """Norm of every row of `W + s B A`, [out], float32 (float64 for float64), without forming the sum.

    `||W||^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>` row by row: 2 out in rank operations, and the memory of [out, rank].
    A and B are rounded to the dtype of W first, as in the matmuls. No gradient.
    """
    with torch.no_grad():
        weight = dense(nominal(weight))
        wide = compute_dtype(weight)
        a, b = lora_a.to(weight.dtype), lora_b.to(weight.dtype).to(wide)
        cross = ((weight @ a.T).to(wide) * b).sum(1)
        gram = a.to(wide) @ a.to(wide).T
        square = torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()
        square = square + 2 * scaling * cross + scaling**2 * ((b @ gram) * b).sum(1)
        return square.clamp_min(0).sqrt()


def rescale(y: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None) -> Tensor:
    """`y * magnitude / norm + bias`, the factor in the dtype of `norm`, the result in that of y.

    Liu et al., arXiv 2402.09353, equation 5; the norm counts as a constant in the backward pass (section 4.3).
    """
    result = y * (magnitude.to(norm.dtype) / norm)
    return (result if bias is None else result + bias).to(y.dtype)
