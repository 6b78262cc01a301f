"""The backends that this process tests: one case list per op serves them all.

pytest                        cpp on the CPU; where there is a GPU also cuda and triton on it (marked gpu)
TRITON_INTERPRET=1 pytest     triton in its interpreter on the CPU, nothing else: tests/gpu/test_interpreter.py
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from forge_core.kernels import available_backends, library


@dataclass(frozen=True)
class Backend:
    """The name of a backend, and the device on which it is tested."""

    name: str
    device: str


def backends(op: str, *, gpu_only: bool = False) -> list[Any]:
    """Values for `pytest.mark.parametrize("backend", ...)`: the backends that `op` has besides the reference.

    With `gpu_only`, those on a GPU: for cases that are too large for the CPU or the interpreter.
    """
    names = available_backends(op)[op]
    if library.TRITON_INTERPRETED:
        interpreted = "triton" in names and not gpu_only
        return [pytest.param(Backend("triton", "cpu"), id="triton-interpreted")] if interpreted else []
    listed = [] if gpu_only or "cpp" not in names else [pytest.param(Backend("cpp", "cpu"), id="cpp")]
    cuda_missing = "" if library.cuda_library_loaded() else library.CUDA_LIBRARY_MISSING
    triton_missing = "" if torch.cuda.is_available() and library.TRITON_INSTALLED else "needs a CUDA device and triton"
    for name, missing in (("cuda", cuda_missing), ("triton", triton_missing)):
        if name in names:
            marks = [pytest.mark.gpu, pytest.mark.skipif(bool(missing), reason=missing)]
            listed.append(pytest.param(Backend(name, "cuda"), id=name, marks=marks))
    return listed
