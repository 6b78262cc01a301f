"""packed_attention by other packages, on a GPU: flash-attn 2, 3 and 4, and torch's own varlen_attn.

They want the longest document as a host number, hence a plan, and no rows past the last document: those are cut off and
come back as zeros. flash-attn runs in its repeatable mode; varlen_attn repeats bit for bit under
`torch.use_deterministic_algorithms(True)` alone.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .attention_call import AttentionCall
from .gpu.attention_tiles import check_plan


@dataclass(frozen=True)
class Peer:
    """A function for documents in a pack: where it comes from, and what it takes.

    Attributes:
        package: to be found before the function is imported.
        module, function: to be imported by the first call.
        capabilities: compute capabilities from the first up to, without, the second.
        head_dim: largest head dimension.
        unlimited: what the package writes for no limit in `window_size`.
        softcap: whether it has one, with a gradient.
        torch_names: torch's names of the arguments (scale, window_size alone) instead of flash-attn's.
    """

    package: str
    module: str
    function: str
    capabilities: tuple[int, int]
    head_dim: int
    unlimited: int | None
    softcap: bool
    torch_names: bool = False

    def load(self) -> Callable[..., Any]:
        """Imports the function."""
        return _load(self.module, self.function)

    def not_supported_reasons(self, call: AttentionCall) -> list[str]:
        """What keeps the package from taking this call."""
        q, k = call.q, call.k
        if q.device.type != "cuda":
            return [f"runs on a CUDA device, got a tensor on {q.device}"]
        if not _installed(self.package):
            return [f"{self.package} is not installed"]
        reasons = []
        major, minor = torch.cuda.get_device_capability(q.device)
        if not self.capabilities[0] <= 10 * major + minor < self.capabilities[1]:
            reasons.append(f"wants compute capability {self.capabilities[0]} to below {self.capabilities[1]}")
        if q.dtype not in (torch.bfloat16, torch.float16):
            reasons.append(f"takes bfloat16 and float16, got {q.dtype}")
        if q.shape[2] > self.head_dim or q.shape[2] % 8:
            reasons.append(f"takes head dimensions in steps of 8 up to {self.head_dim}, got {q.shape[2]}")
        if call.softcap is not None and not self.softcap:
            reasons.append("has no softcap")
        if call.parents is not None:
            reasons.append("has no documents that continue others (parents)")
        if call.plan is None:
            reasons.append("wants plan=, for the length of the longest document")
        if self.torch_names:
            known = inspect.signature(self.load()).parameters
            reasons += [
                f"this version of torch has no {name}" for name in ("window_size", "scale") if name not in known
            ]
            if q.shape[1] != k.shape[1] and "enable_gqa" not in known:
                reasons.append("this version of torch takes as many key/value heads as query heads")
        return reasons

    def run(self, call: AttentionCall) -> Tensor:
        """Calls the package's function on the rows of documents."""
        q, k, v, cu_seqlens, plan, causal, window, softcap, scale, _ = call
        assert plan is not None  # see above
        check_plan(plan, cu_seqlens, q.shape[0])
        tail = q.new_zeros((q.shape[0] - plan.tokens, *q.shape[1:]))
        rows = [x[: plan.tokens] for x in (q, k, v)]
        if plan.tokens == 0:
            return torch.cat([rows[0], tail])
        # Visible keys reach from i - left to i + right, both included.
        left = self.unlimited if window is None else window - 1
        right = 0 if causal and (window is not None or self.torch_names) else left
        options: dict[str, Any] = {"window_size": (left, right)}
        if self.torch_names:
            options["scale"] = scale
            if q.shape[1] != k.shape[1]:
                options["enable_gqa"] = True
        else:
            options |= {"softmax_scale": scale, "causal": causal, "deterministic": True, "softcap": softcap or 0.0}
        out = self.load()(*rows, cu_seqlens, cu_seqlens, plan.max_seqlen, plan.max_seqlen, **options)
        return torch.cat([out[0] if isinstance(out, tuple) else out, tail])


@cache
def _installed(package: str) -> bool:
    parts = package.split(".")  # finding a submodule imports its parents: they come first
    return all(find_spec(".".join(parts[: i + 1])) is not None for i in range(len(parts)))


@cache
def _load(module: str, function: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(module), function)


# flash-attn 3 has no repeatable backward pass at head dimension 256, flash-attn 4 no plain softcap with a gradient.
PEERS = {
    "flash_attn_3": Peer(
        "flash_attn_interface", "flash_attn_interface", "flash_attn_varlen_func", (90, 100), 192, -1, True
    ),
    "flash_attn_2": Peer("flash_attn_2_cuda", "flash_attn", "flash_attn_varlen_func", (80, 130), 256, -1, True),
    "flash_attn_4": Peer("flash_attn.cute", "flash_attn.cute", "flash_attn_varlen_func", (90, 120), 128, None, False),
    "varlen_attn": Peer(
        "torch.nn.attention.varlen", "torch.nn.attention.varlen", "varlen_attn", (80, 130), 256, -1, False, True
    ),
}
