"""What the launchers of this folder share: sizes of the device, and the calls that are compiled ahead of time."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Workload:
    """One call of a launcher at a size of record; every kernel that it launches is compiled and checked without a GPU.

    Attributes:
        name: row of docs/kernels.md, "<op>: <what> <size>".
        call: calls the launcher with tensors of `meta`; values that the host reads must be real CPU tensors.
        bytes: least memory traffic of the call: every input read once, every output written once.
        flops: of its matmuls; 0 for a memory-bound op.
        wgmma: kernels (names of their functions) whose sm_90 code must hold `wgmma` instructions.
        architectures: that the call's kernels are written for.
        asynchronous: kernels of `wgmma` for which it is an error if ptxas serializes them (they wait for each one).
    """

    name: str
    call: Callable[[], Any]
    bytes: int
    flops: int = 0
    wgmma: tuple[str, ...] = ()
    architectures: tuple[int, ...] = (80, 90, 100)
    asynchronous: tuple[str, ...] = ()


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without memory, for a `Workload`; kernels are compiled as for an address divisible by 16."""
    return torch.empty(shape, dtype=dtype, device="meta")


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; those of an H200 for `meta` tensors, 2 for the interpreter."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 2
