"""Block sizes of packed_attention's GPU kernels, and those to choose from.

A tile of a list owns as many rows as a kernel's block holds, so that a call's lists (attention_tiles.py), made before
the op is called, depend on them; nothing here needs triton.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """Configuration of one kernel.

    block_m packed query rows (tokens x heads of a group) meet block_n keys, edge_n at a time where a mask is needed.
    The forward and dQ kernels own block_m rows and loop over keys; the dK/dV kernel owns block_n keys, loops over
    queries and has no edge_n.
    """

    block_m: int
    block_n: int
    edge_n: int
    num_warps: int
    num_stages: int
    registers: int | None = None  # a thread's; without it ptxas may aim at more programs, and spill for that
    edge_stages: int | None = None  # of dK/dV's edges, if others: loads ahead take registers, edges are short

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n} edge {self.edge_n} w{self.num_warps} s{self.num_stages}"


@dataclass(frozen=True)
class Kernels:
    """The three kernels of one device, dtype and head dimension."""

    forward: Blocks
    dq: Blocks
    dkdv: Blocks
    dkdv_tight: Blocks | None = None  # as many keys, at most as many queries, for calls with which dkdv would spill:
    tight_from: int = 1  # those of this `crowding` (packed_attention.py), or more
    forward_shared: Blocks | None = None  # as many rows, where forward would spill with parents
    # Timed against the first ones on the GPU, for the calls of `alternatives`. The same lists of tiles serve them all:
    # as many rows and as large edges, fewer columns at a time, other warps and stages.
    other_forward: tuple[Blocks, ...] = ()
    other_dq: tuple[Blocks, ...] = ()
    other_dkdv: tuple[Blocks, ...] = ()

    def ways(self, kernel: str) -> tuple[Blocks, ...]:
        """The configurations of "forward", "dq" or "dkdv", the default first."""
        return (getattr(self, kernel), *getattr(self, f"other_{kernel}"))

    @cached_property
    def names(self) -> tuple[tuple[str, ...], ...]:
        """Those of the configurations of the three kernels."""
        return tuple(tuple(map(str, self.ways(kernel))) for kernel in ("forward", "dq", "dkdv"))


# Chosen by ahead-of-time compiles (registers, spills, shared memory, programs to a multiprocessor), not by measurement;
# where there are others to choose from, a GPU's first call of a class of sizes times them (attention_choice.py).
# Key: architecture (0: interpreter, 86: those with 99 KiB of shared memory to a program), padded head dimension.
_HALF = {
    (90, 64): Kernels(
        Blocks(64, 128, 64, 4, 2),
        Blocks(64, 128, 64, 4, 2),
        Blocks(64, 128, 0, 8, 2),
        other_forward=(Blocks(64, 64, 64, 4, 3),),
        other_dq=(Blocks(64, 64, 64, 4, 3),),
        other_dkdv=(Blocks(32, 128, 0, 4, 2),),
    ),
    (90, 128): Kernels(
        Blocks(128, 128, 64, 8, 2),
        Blocks(128, 128, 64, 8, 2),
        Blocks(64, 128, 0, 8, 2),
        Blocks(32, 128, 0, 8, 2),
        other_forward=(Blocks(128, 64, 64, 8, 3), Blocks(128, 128, 64, 8, 3)),
        other_dq=(Blocks(128, 64, 64, 8, 3),),
        other_dkdv=(Blocks(32, 128, 0, 8, 3),),
    ),
    (90, 256): Kernels(
        Blocks(128, 64, 32, 8, 2),
        Blocks(128, 32, 32, 8, 2),
        Blocks(32, 64, 0, 8, 2),
        Blocks(16, 64, 0, 8, 2),
        tight_from=2,
    ),
    (100, 64): Kernels(
        Blocks(64, 128, 64, 4, 2),
        Blocks(64, 128, 64, 4, 2),
        Blocks(64, 128, 0, 8, 2),
        Blocks(64, 128, 0, 8, 2, 255, 1),
        other_forward=(Blocks(64, 64, 64, 4, 3),),
        other_dq=(Blocks(64, 64, 64, 4, 3),),
        other_dkdv=(Blocks(32, 128, 0, 8, 2, 255),),
    ),
    (100, 128): Kernels(
        Blocks(128, 128, 64, 8, 2),
        Blocks(128, 128, 64, 8, 2),
        Blocks(64, 128, 0, 8, 2),
        Blocks(32, 128, 0, 8, 2, 255, 1),
        other_forward=(Blocks(128, 64, 64, 8, 3),),
        other_dq=(Blocks(128, 64, 64, 8, 2),),
        other_dkdv=(Blocks(32, 128, 0, 8, 3, 255),),
    ),
    (100, 256): Kernels(
        Blocks(64, 64, 64, 8, 2),
        Blocks(128, 32, 32, 8, 2),
        Blocks(32, 64, 0, 8, 2),
        Blocks(32, 64, 0, 8, 1),
        tight_from=2,
    ),
    (80, 64): Kernels(
        Blocks(128, 64, 64, 4, 2),
        Blocks(64, 64, 64, 4, 2),
        Blocks(32, 128, 0, 8, 2),
        forward_shared=Blocks(128, 64, 64, 8, 2),
        other_forward=(Blocks(128, 64, 64, 8, 2),),
    ),
    (80, 128): Kernels(
        Blocks(64, 64, 64, 4, 2),
        Blocks(64, 64, 64, 4, 2),
        Blocks(64, 64, 0, 8, 2),
        other_forward=(Blocks(64, 64, 64, 4, 3),),
        other_dkdv=(Blocks(32, 64, 0, 4, 2),),
    ),
    (80, 256): Kernels(Blocks(64, 64, 64, 8, 2), Blocks(64, 32, 32, 8, 2), Blocks(32, 32, 0, 8, 2)),
    (86, 256): Kernels(Blocks(64, 32, 32, 8, 2), Blocks(64, 32, 32, 8, 1), Blocks(32, 32, 0, 8, 2)),
    (0, 256): Kernels(
        Blocks(64, 32, 16, 4, 1),
        Blocks(64, 32, 16, 4, 1),
        Blocks(64, 32, 0, 4, 1),
        other_forward=(Blocks(64, 16, 16, 4, 1),),
        other_dq=(Blocks(64, 16, 16, 4, 1),),
        other_dkdv=(Blocks(32, 32, 0, 4, 1),),
    ),
}
# float32 matmuls run as multiply-adds, which need many registers: dQ spills beyond a head dimension of 64.
_FLOAT = {
    64: Kernels(Blocks(32, 32, 32, 8, 1), Blocks(32, 32, 32, 8, 1), Blocks(16, 64, 0, 8, 1)),
    128: Kernels(Blocks(32, 32, 32, 8, 1), Blocks(32, 32, 32, 8, 1), Blocks(16, 64, 0, 8, 1)),
    256: Kernels(Blocks(32, 32, 32, 8, 1), Blocks(32, 16, 16, 4, 1), Blocks(16, 32, 0, 4, 1)),
}


def padded_head_dim(d: int) -> int:
    """Columns of a block: a power of two of at least 16."""
    return max(16, 1 << (d - 1).bit_length())


def kernels(device: torch.device, dtype: torch.dtype, d: int) -> Kernels:
    """The configuration for a head dimension d of at most 256 on a device."""
    return configured(architecture(device), dtype, d)


def configured(arch: int, dtype: torch.dtype, d: int) -> Kernels:
    """Likewise for an `architecture`."""
    width = max(64, padded_head_dim(d))
    if arch == 0:
        return _HALF[0, 256]
    if dtype == torch.float32:
        return _FLOAT[width]
    return _HALF.get((arch, width)) or _HALF[80, width]


@torch.compiler.assume_constant_result
def _block_sizes(device: torch.device, dtype: torch.dtype, d: int) -> tuple[int, int, int, int, int, int]:
    forward, dq, dkdv = (getattr(kernels(device, dtype, d), name) for name in ("forward", "dq", "dkdv"))
    return forward.block_m, forward.edge_n, dq.block_m, dq.edge_n, dkdv.block_n, dkdv.block_m


@torch.compiler.assume_constant_result
def _ways(device: torch.device, dtype: torch.dtype, d: int) -> tuple[tuple[str, ...], ...]:
    return kernels(device, dtype, d).names


def alternatives(
    q: Tensor, k: Tensor, causal: bool, softcap: float | None, shared: bool
) -> tuple[tuple[str, ...], ...]:
    """Names of the configurations of the forward, dQ and dK/dV kernels for a call, the default first.

    More than that for the common calls alone: what a softcap, parents or larger groups need spills in most of them.
    """
    group, d = q.shape[1] // k.shape[1], q.shape[2]
    ways = _ways(q.device, q.dtype, d)
    if not causal or softcap or shared or d not in (64, 128) or group not in (1, 2, 4, 8):
        return tuple(of_kernel[:1] for of_kernel in ways)
    return ways


def max_group(q: Tensor) -> int:
    """Query heads of one key/value head that a tile of queries can hold."""
    sizes = _block_sizes(q.device, q.dtype, q.shape[2])
    return min(sizes[0], sizes[2])


def tile_sizes(q: Tensor, k: Tensor) -> tuple[tuple[int, int], ...]:
    """Tokens of a tile's rows and columns, for the lists of the forward, dQ and dK/dV kernels."""
    group = q.shape[1] // k.shape[1]
    forward_m, forward_n, dq_m, dq_n, dkdv_n, dkdv_m = _block_sizes(q.device, q.dtype, q.shape[2])
    return (forward_m // group, forward_n), (dq_m // group, dq_n), (dkdv_n, max(1, dkdv_m // group))


HOPPER_ROWS = 128  # packed rows of a tile of the Gluon kernel, packed_attention_hopper.py
HOPPER_KEYS, HOPPER_QUERIES = 128, 32  # of a tile, and (packed rows) of a block with a mask, for dK and dV in Gluon
HOPPER_DQ_KEYS = 64  # of a block of packed_attention_hopper_dq.py, whose tiles have HOPPER_ROWS


def padded_group(group: int) -> int:
    """Rows that the Gluon kernel gives to a token: those of `group` heads, and of none up to a power of two."""
    return 1 << (group - 1).bit_length()


def hopper_edge(d: int) -> int:
    """Keys of a block with a mask in the Gluon kernel."""
    return 64 if d <= 128 else 32


def hopper_backward_takes(q: Tensor, k: Tensor) -> tuple[bool, bool]:
    """Whether there are Gluon kernels for dQ, and for dK and dV: what they have registers for."""
    group, d = q.shape[1] // k.shape[1], q.shape[2]
    return d <= 128, padded_group(group) == group <= HOPPER_QUERIES and d in (64, 128)


def hopper_tile_sizes(q: Tensor, k: Tensor, gluon_dq: bool, gluon_dkdv: bool) -> tuple[tuple[int, int], ...]:
    """As `tile_sizes`, for a forward pass by the Gluon kernel and dQ, dK and dV by Gluon's or Triton's."""
    group = q.shape[1] // k.shape[1]
    rows = HOPPER_ROWS // padded_group(group)
    _, dq, dkdv = tile_sizes(q, k)
    if gluon_dq:
        dq = (rows, HOPPER_DQ_KEYS)
    if gluon_dkdv:
        dkdv = (HOPPER_KEYS, HOPPER_QUERIES // group)
    return (rows, hopper_edge(q.shape[2])), dq, dkdv


def architecture(device: torch.device) -> int:
    """80, 86, 90 or 100, the nearest with a configuration; 0 for the interpreter."""
    if device.type == "meta":  # compiled ahead of time
        from triton.runtime import driver

        return driver.active.get_current_target().arch
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return {8: 80 if minor in (0, 7) else 86, 9: 90, 10: 100, 11: 100, 12: 86}.get(major, 80)
