"""AdamW with float32 master weights, LoRA+ groups, global-norm clipping and a state made of plain tensors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

_MOMENTS = ("exp_avg", "exp_avg_sq")


class MasterAdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) over named parameters.

    A float32 parameter is updated in place. One of lower precision gets a float32 master copy: its gradients are summed
    over packs in float32, the master is updated, the parameter is its rounding. Each step's learning rate is given
    by the caller; parameters named `...lora_B...` get `lora_plus_ratio` times as much (LoRA+, arXiv 2402.12354).
    Weight decay spares vectors (norms, biases, DoRA's magnitudes).

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
        self._masters = {name: self._master(parameter) for name, parameter in self._parameters.items()}
        self._max_grad_norm = max_grad_norm
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, master in self._masters.items():
            scale = lora_plus_ratio if ".lora_B" in name else 1.0
            groups.setdefault((scale, weight_decay if master.dim() > 1 else 0.0), []).append(master)
        self._adamw = torch.optim.AdamW(
            [
                {"params": members, "lr": 0.0, "lr_scale": scale, "weight_decay": decay}
                for (scale, decay), members in groups.items()
            ],
            betas=betas,
            eps=eps,
            fused=True,
        )

    def _master(self, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.dtype == torch.float32:
            return parameter
        master = nn.Parameter(parameter.detach().float())

        def take_gradient(low: Tensor) -> None:
            # Runs once per backward, when the whole gradient of this parameter is there: sums over packs in float32
            # and frees the low-precision gradient at once.
            if low.grad is not None:
                wide = low.grad.float()
                master.grad = wide if master.grad is None else master.grad.add_(wide)
                low.grad = None

        parameter.register_post_accumulate_grad_hook(take_gradient)
        return master

    @property
    def trained_parameters(self) -> int:
        """Number of trained values."""
        return sum(parameter.numel() for parameter in self._parameters.values())

    def step(self, learning_rate: float) -> Tensor:
        """Clip, update, clear the gradients; return the gradient's global norm before clipping (scalar, float32).

        Nothing here waits for the device: whether the norm is finite is for the caller to see when it reads it.
        """
        gradients = [master.grad for master in self._masters.values() if master.grad is not None]
        norm = get_total_norm(gradients)
        # The fused kernel divides gradients by this on their way in: clipping takes no pass. 1e-6 as in torch.
        self._adamw.grad_scale = ((norm + 1e-6) / self._max_grad_norm).clamp_min(1.0)  # type: ignore[attr-defined]
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        self._write_back()
        return norm

    @torch.no_grad()
    def _write_back(self) -> None:
        for name, parameter in self._parameters.items():
            if self._masters[name] is not parameter:
                parameter.copy_(self._masters[name])

    def state_tensors(self) -> dict[str, Tensor]:
        """The state on the CPU: `exp_avg.<name>`, `exp_avg_sq.<name>`, `steps.<name>` and `master.<name>` if any."""
        tensors: dict[str, Tensor] = {}
        for name, master in self._masters.items():
            state = self._adamw.state.get(master)
            if state:
                tensors |= {f"{moment}.{name}": state[moment] for moment in _MOMENTS}
                tensors[f"steps.{name}"] = state["step"].reshape(1)
            if master is not self._parameters[name]:
                tensors[f"master.{name}"] = master
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state_tensors` gave; parameters with a master are rewritten from it.

        Raises:
            ValueError: tensors of other names or shapes than this optimizer's.
        """
        expected = {f"{kind}.{name}": p for kind in _MOMENTS for name, p in self._masters.items()}
        expected |= {f"master.{n}": m for n, m in self._masters.items() if m is not self._parameters[n]}
        foreign = sorted(name for name in tensors if name not in expected and not name.startswith("steps."))
        foreign += sorted(
            f"{name} {list(tensors[name].shape)} (expected {list(parameter.shape)})"
            for name, parameter in expected.items()
            if name in tensors and tensors[name].shape != parameter.shape
        )
        missing = sorted(name for name in expected if name.startswith("master.") and name not in tensors)
        if foreign or missing:
            raise ValueError(
                f"optimizer state: belongs to other parameters: {', '.join((foreign + missing)[:5])}; "
                f"{len(foreign)} foreign, {len(missing)} missing"
            )
        for name, master in self._masters.items():
            if f"exp_avg.{name}" in tensors:
                self._adamw.state[master] = self._moments(name, master, tensors)
            if f"master.{name}" in tensors:
                master.data.copy_(tensors[f"master.{name}"])
        self._write_back()

    def _moments(self, name: str, master: nn.Parameter, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        state: dict[str, Any] = {
            moment: torch.empty_like(master).copy_(tensors[f"{moment}.{name}"]) for moment in _MOMENTS
        }
        state["step"] = tensors[f"steps.{name}"].reshape(()).to(master.device, copy=True)
        return state
