"""Calls of packed_attention's Gluon kernels that are compiled ahead of time, for sm_90 only."""

import math
from functools import partial
from typing import Any

import torch

from .attention_blocks import HOPPER_KEYS, HOPPER_ROWS, hopper_backward_takes, padded_group
from .packed_attention_hopper import packed_attention_hopper
from .packed_attention_hopper_backward import dkdv
from .packed_attention_hopper_dq import dq
from .workload import Workload, meta

TOKENS = 8192
# name, query heads, key/value heads, d, causal, window, softcap: what is common, and what costs registers
CALLS = (
    ("D 128", 32, 8, 128, True, 0, 0.0),
    ("D 64", 32, 8, 64, True, 0, 0.0),
    ("D 96", 32, 8, 96, True, 0, 0.0),
    ("D 256, window", 16, 8, 256, True, 512, 0.0),
    ("D 128, window", 32, 8, 128, True, 512, 0.0),
    ("D 128, both directions, window", 32, 32, 128, False, 512, 0.0),
    ("D 128, window, softcap", 32, 16, 128, True, 512, 50.0),
    ("D 128, window, softcap, 7 heads a group", 28, 4, 128, True, 512, 50.0),
    ("D 128, shared prompts", 32, 8, 128, True, 0, 0.0),
    ("D 64, shared prompts, window, softcap", 32, 8, 64, True, 512, 50.0),
    ("D 128, shared prompts, window, softcap", 16, 16, 128, True, 512, 50.0),
    ("D 256, shared prompts, window", 16, 8, 256, True, 512, 0.0),
)
# Of which the forward pass is compiled with consumers that take turns, too.
IN_TURNS = ("D 128", "D 128, shared prompts, window, softcap")


def workloads() -> list[Workload]:
    """The packs of packed_attention.py's workloads."""
    return [workload for call in CALLS for workload in _of_call(*call)]


def _of_call(
    name: str, q_heads: int, kv_heads: int, d: int, causal: bool, window: int, softcap: float
) -> list[Workload]:
    group = q_heads // kv_heads
    q, kv = meta(TOKENS, q_heads, d), meta(TOKENS, kv_heads, d)
    numbers = meta(kv_heads, TOKENS * group, dtype=torch.float32)
    rows = meta(16 * math.ceil(512 / (HOPPER_ROWS // padded_group(group))), 8, dtype=torch.int32)
    keys = meta(16 * 512 // HOPPER_KEYS, 8, dtype=torch.int32)
    context = meta(4096, dtype=torch.int32) if "shared" in name else None
    options = (causal, window, softcap, d**-0.5)
    pairs = TOKENS * (470 if causal else 940)

    def listed(what: str, kernel: str, function: Any, arguments: tuple, products: int, tensors: int) -> Workload:
        return Workload(
            f"packed_attention: Gluon {what} {name}, {q_heads}/{kv_heads} heads", partial(function, *arguments),
            2 * TOKENS * d * tensors, 2 * products * d * q_heads * pairs, (kernel,), (90,), (kernel,),
        )  # fmt: skip

    calls: list[Workload] = []
    arguments: tuple
    for pingpong in (False, True) if name in IN_TURNS else (False,):
        arguments = (q, kv, kv, rows, rows, keys, *options, pingpong, True, True, context)
        what, tensors = "forward in turns" if pingpong else "forward", 2 * q_heads + 2 * kv_heads
        calls.append(listed(what, "hopper_forward_kernel", packed_attention_hopper, arguments, 2, tensors))
    takes = hopper_backward_takes(q, kv)
    if takes[0]:
        arguments = (q, q, kv, kv, q, numbers[None], rows, *options, context)
        calls.append(listed("dQ", "hopper_dq_kernel", dq, arguments, 3, 4 * q_heads + 2 * kv_heads))
    if takes[1]:
        arguments = (q, q, kv, kv, numbers, numbers, keys, *options, context)
        calls.append(listed("dK/dV", "hopper_dkdv_kernel", dkdv, arguments, 4, 2 * q_heads + 4 * kv_heads))
    return calls
