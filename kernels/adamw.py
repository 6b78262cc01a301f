"""AdamW over many tensors in one pass."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from . import reference
from .gradient_norm import list_reasons
from .library import register_op
from .registry import Op

OP = Op("adamw_")


class AdamWTensors:
    """The tensors that an optimizer keeps, listed and checked once for many steps of `adamw_`.

    Args:
        parameters: float32 or float64, any shapes.
        exp_avg: first moments, shapes and dtypes of the parameters; zeros before the first step.
        exp_avg_sq: second moments, likewise.
        rounded: per parameter a tensor of lower precision that is to hold its rounding, or None.
        lr_scales: per parameter the factor of the learning rate (LoRA+, arXiv 2402.12354); None: 1.
        weight_decays: per parameter; None: 0.

    Attributes:
        steps: float32 [parameters], the updates that each has had.

    Raises:
        ValueError: lists of other lengths than parameters, tensors of other shapes, dtypes or devices.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        exp_avg: Sequence[Tensor],
        exp_avg_sq: Sequence[Tensor],
        *,
        rounded: Sequence[Tensor | None] | None = None,
        lr_scales: Sequence[float] | None = None,
        weight_decays: Sequence[float] | None = None,
    ) -> None:
        if not parameters:
            raise ValueError("parameters: got none, expected at least one")
        # Without gradients: what is updated in place here may be leaves of autograd.
        self.parameters = [tensor.detach() for tensor in parameters]
        self.exp_avg, self.exp_avg_sq = list(exp_avg), list(exp_avg_sq)
        self.shapes = [tensor.shape for tensor in parameters]
        device = parameters[0].device
        # For C++ stands for a gradient or a rounded tensor that is not there.
        self.absent = torch.empty(0, dtype=torch.bool, device=device)
        given = rounded if rounded is not None and any(tensor is not None for tensor in rounded) else []
        self.rounded = [self.absent if tensor is None else tensor.detach() for tensor in given]

        count = len(parameters)
        lists = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "rounded": rounded, "lr_scales": lr_scales}
        for name, values in (lists | {"weight_decays": weight_decays}).items():
            if values is not None and len(values) != count:
                raise ValueError(f"{name}: got {len(values)}, expected one per parameter, {count}")
        for name, tensors in {"parameters": parameters, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}.items():
            for i, (tensor, parameter) in enumerate(zip(tensors, parameters, strict=True)):
                wide = tensor.dtype in (torch.float32, torch.float64) and tensor.dtype == parameter.dtype
                if not wide or tensor.shape != parameter.shape or tensor.device != device:
                    raise ValueError(
                        f"{name}: got {tensor.dtype} {list(tensor.shape)} on {tensor.device} at index {i}, expected "
                        f"{parameter.dtype if parameter.dtype == torch.float64 else torch.float32} "
                        f"{list(parameter.shape)} on {device}"
                    )
        for i, (copy, shape) in enumerate(zip(given, self.shapes, strict=False)):
            if copy is not None and (copy.shape != shape or copy.device != device):
                raise ValueError(
                    f"rounded: got {list(copy.shape)} on {copy.device} at index {i}, expected {list(shape)} on {device}"
                )

        def floats(values: Sequence[float] | None, default: float) -> Tensor:
            return torch.tensor([default] * count if values is None else list(values), device=device).float()

        self.steps = torch.zeros(count, device=device)
        self.lr_scales, self.weight_decays = floats(lr_scales, 1.0), floats(weight_decays, 0.0)
        copies = [tensor for tensor in self.rounded if tensor is not self.absent]
        kept = [*self.parameters, *self.exp_avg, *self.exp_avg_sq, *copies]
        self._reasons = {kind: list_reasons(kind, kept) for kind in ("cpu", "cuda")}
        if any(tensor.dtype == torch.float64 for tensor in self.parameters):
            self._reasons = {kind: [*reasons, "takes float32 parameters"] for kind, reasons in self._reasons.items()}
        if not all(tensor.is_contiguous() for tensor in kept):
            self._reasons = {kind: [*reasons, "takes contiguous tensors"] for kind, reasons in self._reasons.items()}

    def not_supported_reasons(self, kind: str) -> list[str]:
        """What keeps the op on "cpu" or "cuda" from taking these tensors."""
        return self._reasons[kind]


def adamw_(
    tensors: AdamWTensors,
    gradients: Sequence[Tensor | None],
    *,
    learning_rate: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    norm: Tensor | None = None,
    max_norm: float = 1.0,
    backend: str = "auto",
) -> None:
    """One step of AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2) for all tensors, in place.

    With g the gradient, clipped by the factor min(1, max_norm / (norm + 1e-6)), and eta the learning rate times the
    tensor's factor:

        m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
        p = p - eta weight_decay p - eta (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    and the rounded tensor, where there is one, becomes the rounding of p. In float32 (float64 for float64 parameters);
    every value is read and written once. Gradients stay as they are. Nothing waits for the device, and with a learning
    rate in a tensor the call can be captured in a CUDA graph.

    Args:
        tensors: what is updated, with the step count t of each.
        gradients: shapes of the parameters, float32, bfloat16, float16 or float64; None leaves the tensor as it is, its
            moments and its step count included.
        learning_rate: a number, or a float32 scalar on the device of the parameters.
        betas: as in the paper, in [0, 1).
        eps: as in the paper, >= 0.
        norm: norm of all gradients, float32 scalar on the device of the parameters; None: no clipping.
        max_norm: > 0.
        backend: "auto" tries "cpp" (CPU), "cuda", then "reference".

    Raises:
        ValueError: shapes do not match, a number is out of range, or the named backend cannot take the inputs.
    """
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas: got {betas}, expected two numbers in [0, 1)")
    if not eps >= 0.0:
        raise ValueError(f"eps: got {eps}, expected at least 0")
    if not max_norm > 0.0:
        raise ValueError(f"max_norm: got {max_norm}, expected a number above 0; norm=None does not clip")
    given = [gradient for gradient in gradients if gradient is not None]
    if [gradient.shape for gradient in given] != tensors.shapes:
        _check_shapes(gradients, tensors.shapes)
    run = OP.select(backend, tensors, given)
    if len(given) < len(gradients):
        given = [tensors.absent if gradient is None else gradient for gradient in gradients]
    rate, rate_tensor = (0.0, learning_rate) if isinstance(learning_rate, Tensor) else (learning_rate, None)
    run(
        tensors.parameters, given, tensors.exp_avg, tensors.exp_avg_sq, tensors.steps, tensors.rounded,
        tensors.lr_scales, tensors.weight_decays, rate, rate_tensor, *betas, eps, norm, max_norm,
    )  # fmt: skip


def _check_shapes(gradients: Sequence[Tensor | None], shapes: list[torch.Size]) -> None:
    if len(gradients) != len(shapes):
        raise ValueError(f"gradients: got {len(gradients)}, expected one per parameter, {len(shapes)}")
    for i, (gradient, shape) in enumerate(zip(gradients, shapes, strict=True)):
        if gradient is not None and gradient.shape != shape:
            raise ValueError(f"gradients: got shape {list(gradient.shape)} at index {i}, expected {list(shape)}")


def _reasons(kind: str, tensors: AdamWTensors, gradients: list[Tensor]) -> list[str]:
    return list(dict.fromkeys(tensors.not_supported_reasons(kind) + list_reasons(kind, gradients)))


OP.register("cpp", torch.ops.forge.adamw_, partial(_reasons, "cpu"))
OP.register("cuda", torch.ops.forge.adamw_, partial(_reasons, "cuda"))
OP.register("reference", reference.adamw_, lambda *_: [])


def _fake(*_: object) -> None:
    return None


register_op("adamw_", _fake)
