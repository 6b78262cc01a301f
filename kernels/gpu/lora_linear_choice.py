"""The ways to compute the large matmul of lora_linear, which of them can take given operands, and the choice.

"cublas": the adapter's product by a Triton kernel, to which torch.addmm_ adds every x_i W_i (beta = 1): the default.
"gluon": lora_linear_hopper.py, sm_90 only. "triton 128x256x64 ...": lora_linear_gemm.py with that tile.
"""

import warnings
from functools import cache, partial

import torch
import triton
from torch import Tensor

from . import tuning
from .lora_linear_gemm import Config, Operands, launch, padded_rank

_WIDE, _SQUARE = Config(128, 256, 64, 8, 3, tma=True), Config(128, 128, 64, 8, 4, tma=True)
_NARROW = Config(128, 64, 64, 8, 4, tma=True)

# Largest rank that each tile takes, for one, two and three projections: without dropout bits, with them; 0: none.
# Beyond it registers spill, shared memory does not suffice, or - sm_100 keeps one accumulator per step of the sum -
# tensor memory does not, which Triton compiles to a trap. At these ranks all of them are compiled ahead of time and
# checked (docs/kernels.md).
RANKS: dict[int, dict[Config, tuple[tuple[int, int, int], tuple[int, int, int]]]] = {
    80: {
        Config(128, 128, 64, 8, 3): ((256, 128, 64), (256, 128, 16)),
        Config(128, 256, 32, 8, 3): ((32, 32, 0), (16, 0, 0)),
    },
    90: {_WIDE: ((16, 16, 16), (16, 0, 0)), _SQUARE: ((128, 128, 64), (128, 64, 32))},
    100: {
        _WIDE: ((128, 0, 0), (128, 0, 0)),
        _SQUARE: ((256, 128, 0), (256, 0, 0)),
        _NARROW: ((0, 0, 64), (0, 128, 32)),
    },
}

_BY_NAME = {str(config): config for table in RANKS.values() for config in table}


def matmul(o: Operands, way: str | None = None) -> Tensor:
    """The result in the given way, or in the fastest: measured on the first call per size, see tuning.py."""
    if way is None:
        names = ways(o, torch.cuda.get_device_capability(o.s.device)) if o.s.is_cuda else ["cublas"]
        way = tuning.choose(_key(o), {name: partial(_run, o, name) for name in names}, "cublas")
    return _run(o, way)


def ways(o: Operands, capability: tuple[int, int]) -> list[str]:
    """Names of the ways that can take the operands on a GPU of this compute capability."""
    tensors = [*o.xs, *o.ws]
    if o.s.dtype == torch.float32 or 0 in o.shape or not all(t.is_contiguous() and t.numel() for t in tensors):
        return ["cublas"]
    architecture = 80 if capability < (9, 0) else 90 if capability < (10, 0) else 100
    widest, masked = max(map(padded_rank, o.ranks)), o.words is not None
    configs = [config for config, most in RANKS[architecture].items() if widest <= most[masked][len(o.xs) - 1]]
    tma = all(_tma_can_read(t) for t in tensors) and o.shape[1] % 8 == 0
    names = [str(config) for config in configs if tma or not config.tma]
    ranks_fit = all(rank % 16 == 0 for rank in o.ranks)
    if architecture == 90 and _gluon_installed() and tma and ranks_fit and all(_tma_can_read(t) for t in (o.s, *o.bs)):
        names.append("gluon")
    return ["cublas", *names]


@cache
def _gluon_installed() -> bool:
    # An experimental part of Triton, whose names change between its versions.
    try:
        from . import lora_linear_hopper  # noqa: F401
    except ImportError as error:
        warnings.warn(f"gluon: not used: Triton {triton.__version__} has another interface: {error}", stacklevel=2)
        return False
    return True


def _tma_can_read(t: Tensor) -> bool:
    return t.data_ptr() % 16 == 0 and t.stride(0) % 8 == 0 and t.stride(1) == 1


def _run(o: Operands, way: str) -> Tensor:
    if way == "cublas":
        return _cublas(o)
    if way == "gluon":
        from .lora_linear_hopper import launch as launch_gluon

        return launch_gluon(o)
    return launch(o, _BY_NAME[way])


def _cublas(o: Operands) -> Tensor:
    # The small term first: it is rounded once while it is small, and the large sum once per projection.
    small = Config(32, 64, 32, 8, 1) if o.s.dtype == torch.float32 else Config(64, 128, 32, 8, 1)
    out = launch(o, small, main=False)
    for x, w in zip(o.xs, o.ws, strict=True):
        out.addmm_(x, w.t() if o.nt else w)
    return out


def _key(o: Operands) -> str:
    m, n = o.shape
    reductions = "+".join(str(x.shape[1]) for x in o.xs)
    kind = f"{'NT' if o.nt else 'NN'}{' bias' if o.bias is not None else ''}{' dropout' if o.words is not None else ''}"
    return f"lora_linear {kind} {triton.next_power_of_2(m)} x {reductions} -> {n} r {o.ranks} {o.s.dtype}"
