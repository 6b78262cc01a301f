"""AdamW with float32 master weights, LoRA+ groups, global-norm clipping and a state made of plain tensors."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

from forge_core.kernels import AdamWTensors, adamw_, gradient_norm


class MasterAdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) over named parameters.

    A float32 parameter is updated in place. One of lower precision gets a float32 master copy: its gradients are summed
    over packs in float32, the master is updated, the parameter is its rounding. Each step's learning rate is given
    by the caller; parameters named `...lora_B...` get `lora_plus_ratio` times as much (LoRA+, arXiv 2402.12354).
    Weight decay spares vectors (norms, biases, DoRA's magnitudes). Sharded parameters (FSDP2) are updated where they
    lie.

    Args:
        parameters: name -> parameter; those that do not require gradients are left out.
        betas, eps, weight_decay: as in the paper.
        max_grad_norm: gradients are scaled down to this global norm.
        lora_plus_ratio: learning rate of lora_B over that of everything else.

    Raises:
        ValueError: no parameter requires a gradient.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        lora_plus_ratio: float = 1.0,
    ) -> None:
        self._parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        if not self._parameters:
            raise ValueError("parameters: none of them requires a gradient, so there is nothing to train")
        self._betas, self._eps, self._max_grad_norm = betas, eps, max_grad_norm
        self._gradients: dict[str, Tensor] = {}  # of parameters that have a master
        self._masters = {name: self._master(name, parameter) for name, parameter in self._parameters.items()}
        self._moments = {
            kind: {name: torch.zeros_like(master) for name, master in self._masters.items()}
            for kind in ("exp_avg", "exp_avg_sq")
        }
        self._tensors = AdamWTensors(
            [_local(master) for master in self._masters.values()],
            *([_local(moment) for moment in moments.values()] for moments in self._moments.values()),
            rounded=[None if p is self._masters[name] else _local(p) for name, p in self._parameters.items()],
            lr_scales=[lora_plus_ratio if ".lora_B" in name else 1.0 for name in self._masters],
            weight_decays=[weight_decay if master.dim() > 1 else 0.0 for master in self._masters.values()],
        )

    def _master(self, name: str, parameter: nn.Parameter) -> Tensor:
        if parameter.dtype == torch.float32:
            return parameter

        def take_gradient(low: Tensor) -> None:
            # Runs once per backward, when the whole gradient of this parameter is there: sums over packs in float32,
            # takes that of a single pack as it is.
            if low.grad is not None:
                sum_before = self._gradients.get(name)
                self._gradients[name] = low.grad if sum_before is None else sum_before.float().add_(low.grad)
                low.grad = None

        parameter.register_post_accumulate_grad_hook(take_gradient)
        return parameter.detach().float()

    @property
    def trained_parameters(self) -> int:
        """Number of trained values."""
        return sum(parameter.numel() for parameter in self._parameters.values())

    def step(self, learning_rate: float) -> Tensor:
        """Clip, update, clear the gradients; return the gradient's global norm before clipping (scalar, float32).

        Nothing here waits for the device: whether the norm is finite is for the caller to see when it reads it.
        """
        gradients = [self._take_gradient(name, master) for name, master in self._masters.items()]
        norm = _global_norm([gradient for gradient in gradients if gradient is not None])
        adamw_(
            self._tensors,
            [None if gradient is None else _local(gradient) for gradient in gradients],
            learning_rate=learning_rate,
            betas=self._betas,
            eps=self._eps,
            norm=norm,
            max_norm=self._max_grad_norm,
        )
        return norm

    def _take_gradient(self, name: str, master: Tensor) -> Tensor | None:
        if master is not self._parameters[name]:
            return self._gradients.pop(name, None)
        gradient, master.grad = master.grad, None
        return gradient

    def state_tensors(self) -> dict[str, Tensor]:
        """The state on the CPU: `exp_avg.<name>`, `exp_avg_sq.<name>`, `steps.<name>` and `master.<name>` if any."""
        tensors: dict[str, Tensor] = {}
        for (name, master), steps in zip(self._masters.items(), self._tensors.steps.cpu().split(1), strict=True):
            if steps > 0:
                tensors |= {f"{kind}.{name}": moments[name] for kind, moments in self._moments.items()}
                tensors[f"steps.{name}"] = steps.clone()
            if master is not self._parameters[name]:
                tensors[f"master.{name}"] = master
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state_tensors` gave; parameters with a master are rewritten from it.

        Raises:
            ValueError: tensors of other names or shapes than this optimizer's.
        """
        own = {f"{kind}.{name}": moment for kind, moments in self._moments.items() for name, moment in moments.items()}
        own |= {f"master.{n}": m for n, m in self._masters.items() if m is not self._parameters[n]}
        foreign = sorted(name for name in tensors if name not in own and not name.startswith("steps."))
        foreign += sorted(
            f"{name} {list(tensors[name].shape)} (expected {list(tensor.shape)})"
            for name, tensor in own.items()
            if name in tensors and tensors[name].shape != tensor.shape
        )
        missing = sorted(name for name in own if name.startswith("master.") and name not in tensors)
        if foreign or missing:
            raise ValueError(
                f"optimizer state: belongs to other parameters: {', '.join((foreign + missing)[:5])}; "
                f"{len(foreign)} foreign, {len(missing)} missing"
            )
        for name, tensor in own.items():
            if name in tensors:
                tensor.copy_(tensors[name])
        for i, (name, master) in enumerate(self._masters.items()):
            if f"steps.{name}" in tensors:
                self._tensors.steps[i : i + 1] = tensors[f"steps.{name}"]
            if master is not self._parameters[name]:
                self._parameters[name].copy_(master)


def _local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this rank holds; other tensors as they are."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


def _global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm over all ranks: of shards every rank's counts, of what is replicated one copy."""
    parts: dict[tuple[DeviceMesh, tuple[Placement, ...]] | None, list[Tensor]] = {}
    for gradient in gradients:
        layout = (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else None
        parts.setdefault(layout, []).append(gradient)
    if parts.keys() <= {None}:
        return gradient_norm(gradients)
    squares = []
    for layout, members in parts.items():
        square = gradient_norm([_local(gradient) for gradient in members]).square()
        if layout is not None:
            mesh, placements = layout
            added_up = [Partial() if placement.is_shard() else Replicate() for placement in placements]
            square = DTensor.from_local(square, mesh, added_up).full_tensor()
        squares.append(square)
    return torch.stack(squares).sum().sqrt()
