"""What the backends of packed_attention are given."""

from typing import NamedTuple

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
