"""What the backends of packed_attention are given."""

from typing import NamedTuple

import torch
from torch import Tensor

from .pack import PackPlan


class AttentionCall(NamedTuple):
    """The arguments of packed_attention, checked, and `scale` a number."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens: Tensor
    plan: PackPlan | None
    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    parents: Tensor | None = None


def list_reasons(call: AttentionCall) -> list[str]:
    """What keeps a GPU's lists of tiles from being made: those with parents are a plan's, or made on the host."""
    waits = call.parents is not None and call.plan is None and call.q.is_cuda and not torch.compiler.is_compiling()
    if waits and torch.cuda.is_current_stream_capturing():
        return ["wants plan= beside parents= while a CUDA graph is captured: without it, it waits for the GPU"]
    return []
