"""What the launchers of packed_attention's Gluon kernels share."""

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .packed_attention import _bulk_copies
from .workload import multiprocessors

# Two consumers of four warps, and a producer. Registers of a thread are 168 at the launch, on average of the three.
PARTITIONS = {"num_warps": 4, "maxnreg": 168, "CONSUMER_REGISTERS": 240, "PRODUCER_REGISTERS": 24}


def readable(*tensors: Tensor) -> list[Tensor]:
    """The tensors, or copies where the copy engine could not read them."""
    return [x if x.stride(2) == 1 and _bulk_copies(x) else x.contiguous() for x in tensors]


def described(x: Tensor, block: list[int]) -> TensorDescriptor:
    """x for the copy engine, in blocks that wgmma can read."""
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    return TensorDescriptor.from_tensor(x, block, gl.NVMMASharedLayout.get_default_for(block, dtype))


def schedule(tiles: Tensor, kv_heads: int) -> tuple[int, int, int]:
    """Items (tile, head), programs, and items of a program.

    All are arguments of the kernels: gl.num_programs would cost a register.
    """
    items = tiles.shape[0] * kv_heads
    programs = min(items, multiprocessors(tiles.device))
    return items, programs, triton.cdiv(items, programs)
