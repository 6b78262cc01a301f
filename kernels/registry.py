"""Which implementations an op has, and why each can or cannot take given inputs.

Every op module builds one `Op`, registers its backends in the order in which `backend="auto"` tries them and calls
`OP.select(backend, *inputs)`. A backend that is asked for by name runs or raises; "auto" takes the first whose list of
reasons is empty. Nothing falls back in silence: `available_backends()` and the error text show every reason.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from . import library

Reasons = Callable[..., list[str]]


class Refusal(Exception):
    """What a backend raises that has no reason against a call, and cannot run it after all: another package's error."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an op: `run(*inputs)` and what keeps it from taking inputs."""

    name: str
    run: Callable[..., Any]
    not_supported_reasons: Reasons


@dataclass
class Op:
    """An op and its backends, in the order of preference of `backend="auto"`."""

    name: str
    backends: dict[str, Backend] = field(default_factory=dict)

    def __post_init__(self) -> None:
        OPS[self.name] = self

    def register(self, name: str, run: Callable[..., Any], reasons: Reasons) -> None:
        """Adds a backend as the next choice of "auto"; `reasons(*inputs)` says why it cannot run."""
        self.backends[name] = Backend(name, run, reasons)

    def select(self, backend: str, *inputs: Any) -> Callable[..., Any]:
        """Returns the implementation to call with `inputs`.

        Raises:
            ValueError: `backend` is unknown, or it (for "auto": every backend) cannot take the inputs.
        """
        if backend == "auto":
            for candidate in self.backends.values():
                if not candidate.not_supported_reasons(*inputs):
                    return candidate.run
            raise ValueError(f"{self.name}: no backend can take {_describe(inputs)}:{self._all_reasons(inputs)}")
        if backend not in self.backends:
            raise ValueError(
                f"backend: got {backend!r}, expected 'auto' or one of {list(self.backends)} for {self.name}"
            )
        if self.backends[backend].not_supported_reasons(*inputs):
            raise ValueError(
                f"{self.name}: backend {backend!r} cannot take {_describe(inputs)}. "
                f"All backends:{self._all_reasons(inputs)}"
            )
        return self.backends[backend].run

    def _all_reasons(self, inputs: tuple[Any, ...]) -> str:
        lines = []
        for candidate in self.backends.values():
            reasons = candidate.not_supported_reasons(*inputs)
            lines.append(f"\n  {candidate.name}: " + ("; ".join(reasons) if reasons else "can run"))
        return "".join(lines)


OPS: dict[str, Op] = {}


def available_backends(op: str | None = None) -> dict[str, list[str]]:
    """Names of the backends of each op (or of `op` alone), in the order in which "auto" tries them.

    A listed backend may still be unable to take certain inputs; calling the op with it by name then says why.

    Raises:
        ValueError: `op` is not the name of an op.
    """
    if op is not None and op not in OPS:
        raise ValueError(f"op: got {op!r}, expected one of {sorted(OPS)}")
    return {name: list(OPS[name].backends) for name in ([op] if op else sorted(OPS))}


def no_reasons(*inputs: Any) -> list[str]:
    """For backends that take everything (the plain-torch reference)."""
    return []


def cpp_reasons(*tensors: torch.Tensor | None) -> list[str]:
    """What keeps the C++ ops of `_C.so` from taking these tensors: they want float32 or bfloat16 on the CPU."""
    reasons = []
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            reasons.append(f"runs on the CPU, got a tensor on {tensor.device}")
        if tensor.dtype not in (torch.float32, torch.bfloat16):
            reasons.append(f"takes float32 and bfloat16, got {tensor.dtype}")
    return list(dict.fromkeys(reasons))


def cuda_reasons(*tensors: torch.Tensor | None) -> list[str]:
    """What keeps the CUDA ops of `_C_cuda.so` from taking these tensors: they want one of three dtypes on a GPU."""
    reasons = [] if library.cuda_library_loaded() else [library.CUDA_LIBRARY_MISSING]
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cuda":
            reasons.append(f"runs on a CUDA device, got a tensor on {tensor.device}")
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            reasons.append(f"takes float32, bfloat16 and float16, got {tensor.dtype}")
    return list(dict.fromkeys(reasons))


def triton_reasons(*tensors: torch.Tensor | None) -> list[str]:
    """What keeps the Triton kernels of kernels/gpu/ from taking these tensors: as the CUDA ops, and Triton itself."""
    reasons = [] if library.TRITON_INSTALLED else ["triton is not installed (a CUDA build of torch comes with it)"]
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cuda" and not (library.TRITON_INTERPRETED and tensor.device.type == "cpu"):
            reasons.append(
                f"runs on a CUDA device (with TRITON_INTERPRET=1 set before the start, interpreted on the CPU), got a "
                f"tensor on {tensor.device}"
            )
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            reasons.append(f"takes float32, bfloat16 and float16, got {tensor.dtype}")
    return list(dict.fromkeys(reasons))


def _describe(inputs: tuple[Any, ...]) -> str:
    parts = []
    for value in inputs:
        if isinstance(value, torch.Tensor):
            parts.append(f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} on {value.device}")
        elif isinstance(value, list | tuple) and value and isinstance(value[0], torch.Tensor):
            parts.append("[" + _describe(tuple(value)) + "]")
    return ", ".join(parts)
