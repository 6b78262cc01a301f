"""packed_attention by other packages, on a GPU: flash-attn 2, 3 and 4, cuDNN, and torch's own varlen_attn.

They want the longest document as a host number, hence a plan, and no rows past the last document: those are cut off and
come back as zeros. flash-attn runs in its repeatable mode; cuDNN and varlen_attn repeat bit for bit only under
`torch.use_deterministic_algorithms(True)` (see `Peer.unrepeatable`), without which "auto" does not try them.

"cudnn" is the Python frontend's function (`pip install nvidia-cudnn-frontend`, 1.30 or later), not torch's own op
`aten::_cudnn_attention_forward`: docs/LOG.md says why. It makes a plan for every number of documents and longest
document that it has not met, of which it keeps 128. Its repeatable backward pass keeps documents x heads x longest^2
values of scratch on a Hopper GPU; with cuDNN 9.25 the environment's CUDNN_FRONTEND_ATTN_DP_WORKSPACE_LIMIT=0 asks for
one that does without.
"""

import importlib
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .attention_call import AttentionCall
from .gpu.attention_tiles import check_plan
from .registry import Refusal

Options = dict[str, Any]
_FLASH = "flash_attn_varlen_func"
_VARLEN = "torch.nn.attention.varlen"


def _flash_options(call: AttentionCall, longest: int, unlimited: int | None = -1) -> Options:
    left, right = _window(call, unlimited)
    return {
        "cu_seqlens_q": call.cu_seqlens, "cu_seqlens_k": call.cu_seqlens, "max_seqlen_q": longest,
        "max_seqlen_k": longest, "softmax_scale": call.scale, "causal": call.causal, "window_size": (left, right),
        "softcap": call.softcap or 0.0, "deterministic": True,
    }  # fmt: skip


def _flash_4_options(call: AttentionCall, longest: int) -> Options:
    options = _flash_options(call, longest, None)
    del options["softcap"]  # none that has a gradient
    return options


def _varlen_options(call: AttentionCall, longest: int) -> Options:
    left, right = _window(call, -1)
    options = {
        "cu_seq_q": call.cu_seqlens, "cu_seq_k": call.cu_seqlens, "max_q": longest, "max_k": longest,
        "scale": call.scale, "window_size": (left, 0 if call.causal else right),
    }  # fmt: skip
    # torch 2.11 takes fewer key/value heads as they come, later versions want to be told.
    told = call.q.shape[1] != call.k.shape[1] and "enable_gqa" in _arguments(_VARLEN, "varlen_attn")
    return options | {"enable_gqa": True} if told else options


def _cudnn_options(call: AttentionCall, longest: int) -> Options:
    options = {
        "cu_seqlens_q": call.cu_seqlens, "cu_seqlens_kv": call.cu_seqlens, "max_seqlen_q": longest,
        "max_seqlen_kv": longest, "scale": call.scale, "is_causal": call.causal,
        "return_lse": True,  # which its backward pass needs
    }  # fmt: skip
    if call.window is not None:
        options["window_left"] = call.window  # keys that a query sees, its own included
        if not call.causal:
            options["window_right"] = call.window - 1
    return options


def _window(call: AttentionCall, unlimited: int | None) -> tuple[int | None, int | None]:
    """flash-attn's: visible keys reach from i - left to i + right, both included."""
    if call.window is None:
        return unlimited, unlimited
    return call.window - 1, 0 if call.causal else call.window - 1


@dataclass(frozen=True)
class Peer:
    """A function for documents in a pack: where it comes from, and what it takes.

    Attributes:
        package: to be found before the function is imported.
        module, function: to be imported by the first call.
        options: its arguments behind q, k and v: those of a call whose longest document has so many rows.
        capabilities: compute capabilities from the first up to, without, the second.
        head_dim: largest head dimension.
        hopper_head_dim: the largest on a Hopper GPU, where that is another one.
        softcap: whether it has one, with a gradient.
        asks_torch: whether the backward pass is the repeatable one only under torch.use_deterministic_algorithms.
        repeats_on: capabilities, likewise, for which there is a repeatable backward pass.
        errors: classes of the module by which the package refuses a call, besides Python's own.
    """

    package: str
    module: str
    function: str
    options: Callable[[AttentionCall, int], Options]
    capabilities: tuple[int, int]
    head_dim: int
    hopper_head_dim: int | None = None
    softcap: bool = False
    asks_torch: bool = False
    repeats_on: tuple[int, int] = (0, 1000)
    errors: tuple[str, ...] = ()

    def load(self) -> Callable[..., Any]:
        """Imports the function."""
        return _load(self.module, self.function)

    def not_supported_reasons(self, call: AttentionCall) -> list[str]:
        """What keeps the package from taking this call."""
        q = call.q
        if q.device.type != "cuda":
            return [f"runs on a CUDA device, got a tensor on {q.device}"]
        if not _installed(self.package):
            return [f"{self.package} is not installed"]
        reasons = []
        capability = _capability(q.device)
        if not self.capabilities[0] <= capability < self.capabilities[1]:
            reasons.append(f"wants compute capability {self.capabilities[0]} to below {self.capabilities[1]}")
        if q.dtype not in (torch.bfloat16, torch.float16):
            reasons.append(f"takes bfloat16 and float16, got {q.dtype}")
        head_dim = self.hopper_head_dim if self.hopper_head_dim and capability == 90 else self.head_dim
        if q.shape[2] > head_dim or q.shape[2] % 8:
            reasons.append(f"takes head dimensions in steps of 8 up to {head_dim}, got {q.shape[2]}")
        if call.softcap is not None and not self.softcap:
            reasons.append("has no softcap")
        if call.parents is not None:
            reasons.append("has no documents that continue others (parents)")
        if self.asks_torch and _deterministic() and not self._can_repeat(q.device):
            reasons.append("has no repeatable backward pass here, for which torch.use_deterministic_algorithms asks")
        if call.plan is None:
            reasons.append("wants plan=, for the length of the longest document")
        known = _arguments(self.module, self.function)
        if isinstance(known, str):
            return [*reasons, known]
        lacking = [name for name in self.options(call, 0) if name not in known]
        return reasons + [f"{self.module}.{self.function} of this version has no {name}" for name in lacking]

    def unrepeatable(self, device: torch.device) -> list[str]:
        """What keeps gradients from repeating bit for bit, as things are set now."""
        if not self._can_repeat(device):
            return ["has no repeatable backward pass on this GPU"]
        if self.asks_torch and not _deterministic():
            return ["repeats only under torch.use_deterministic_algorithms(True)"]
        return []

    def _can_repeat(self, device: torch.device) -> bool:
        return self.repeats_on[0] <= _capability(device) < self.repeats_on[1]

    def run(self, call: AttentionCall) -> Tensor:
        """Calls the package's function on the rows of documents."""
        plan = call.plan
        assert plan is not None  # see above
        check_plan(plan, call.cu_seqlens, call.q.shape[0])
        tail = call.q.new_zeros((call.q.shape[0] - plan.tokens, *call.q.shape[1:]))
        if call.scale < 0:  # some take the largest logit from the largest product
            call = call._replace(q=-call.q, scale=-call.scale)
        rows = [x[: plan.tokens] for x in (call.q, call.k, call.v)]
        if plan.tokens == 0:
            return torch.cat([rows[0], tail])
        out = self.load()(*rows, **self.options(call, plan.max_seqlen))
        out = out[0] if isinstance(out, tuple) else out
        return torch.cat([out, tail]) if tail.shape[0] else out

    def refusals(self) -> tuple[type[Exception], ...]:
        """The exceptions by which the package may say that it does not take a call after all."""
        own = (getattr(importlib.import_module(self.module), name) for name in self.errors)
        return (ImportError, TypeError, ValueError, AssertionError, RuntimeError, *own)

    def attempt(self, call: AttentionCall) -> Tensor:
        """`run` for a call that may fail.

        Raises:
            Refusal: the package does not take the call. An error of the GPU is raised as it is.
        """
        try:
            return self.run(call)
        except torch.AcceleratorError:
            raise
        except self.refusals() as error:
            # What has broken the GPU's context comes up again here, whatever class the package gave it.
            if call.q.is_cuda:
                torch.cuda.synchronize()
            raise Refusal(f"{type(error).__name__}: {error}") from error


def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _deterministic() -> bool:
    # With warn_only torch's own backward pass, for one, stays as it is.
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


@cache
def _installed(package: str) -> bool:
    parts = package.split(".")  # finding a submodule imports its parents: they come first
    return all(find_spec(".".join(parts[: i + 1])) is not None for i in range(len(parts)))


@cache
def _load(module: str, function: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(module), function)


@cache
def _arguments(module: str, function: str) -> Collection[str] | str:
    """Names of a function's arguments, or why it cannot be imported."""
    try:
        return inspect.signature(_load(module, function)).parameters
    except (ImportError, AttributeError, OSError) as error:  # another version, or one built for another torch
        return f"{module}.{function} cannot be imported: {error}"


# flash-attn 3 has no repeatable backward pass at head dimension 256, flash-attn 4 no plain softcap with a gradient.
PEERS = {
    "flash_attn_3": Peer(
        "flash_attn_interface", "flash_attn_interface", _FLASH, _flash_options, (90, 100), 192, softcap=True
    ),
    "flash_attn_2": Peer("flash_attn_2_cuda", "flash_attn", _FLASH, _flash_options, (80, 130), 256, softcap=True),
    "flash_attn_4": Peer("flash_attn.cute", "flash_attn.cute", _FLASH, _flash_4_options, (90, 120), 128),
    "cudnn": Peer(
        "cudnn", "cudnn", "sdpa_torch", _cudnn_options, (80, 130), 128, hopper_head_dim=256, asks_torch=True,
        repeats_on=(90, 110), errors=("cudnnGraphNotSupportedError",),
    ),
    "varlen_attn": Peer(
        _VARLEN, _VARLEN, "varlen_attn", _varlen_options, (80, 130), 256, asks_torch=True
    ),
}  # fmt: skip
