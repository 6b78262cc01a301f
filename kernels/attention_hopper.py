"""packed_attention by the Gluon kernels for Hopper.

What the Gluon kernels of the backward pass do not take is Triton's: they agree on what lies between them, `lse` in
base 2 and delta.
"""

import functools
import importlib
import warnings

import torch
from torch import Tensor

from . import library
from .attention_call import AttentionCall, list_reasons
from .gpu.attention_blocks import HOPPER_ROWS, hopper_backward_takes, hopper_tile_sizes, padded_group
from .gpu.attention_tiles import tile_lists
from .library import register_op

# backend -> whether the two warpgroups of the forward kernel take turns, whether dQ is Gluon's, and whether dK and dV.
NAMES = {
    "gluon": (False, True, True),
    "gluon_pingpong": (True, True, True),
    "gluon_dkdv": (False, False, True),
    "gluon_forward": (False, False, False),
}


def reasons(call: AttentionCall) -> list[str]:
    """What keeps the Gluon kernel from taking this call."""
    q, k = call.q, call.k
    if q.device.type != "cuda":
        return [f"runs on a Hopper GPU, got a tensor on {q.device}"]
    capability = torch.cuda.get_device_capability(q.device)
    if capability[0] != 9:
        return [f"runs on a Hopper GPU (compute capability 9.0), got {capability[0]}.{capability[1]}"]
    found = _language_reasons()
    d, group = q.shape[2], q.shape[1] // k.shape[1]
    if q.dtype not in (torch.bfloat16, torch.float16):
        found = [*found, f"takes bfloat16 and float16, got {q.dtype}"]
    if d > 256 or d % 8:
        found = [*found, f"takes head dimensions in steps of 8 up to 256, got {d}"]
    if padded_group(group) > HOPPER_ROWS // 2:
        found = [*found, f"takes up to {HOPPER_ROWS // 2} query heads to a key/value head, got {group}"]
    return found + list_reasons(call)


@functools.cache
def _language_reasons() -> list[str]:
    if not library.TRITON_INSTALLED:
        return ["triton is not installed (a CUDA build of torch comes with it)"]
    try:  # an experimental part of Triton, whose names change between its versions
        importlib.import_module(".gpu.packed_attention_hopper", __package__)
    except ImportError as error:
        warnings.warn(f"gluon: not used: this version of Triton has another interface: {error}", stacklevel=2)
        return [f"this version of Triton has another interface: {error}"]
    return []


def run(ways: tuple[bool, bool, bool], call: AttentionCall) -> Tensor:
    """Attention by the Gluon kernel; see `reasons`."""
    q, k, v, cu_seqlens, plan, causal, window, softcap, scale, parents = call
    if scale < 0:  # the kernel takes the largest logit from the largest product
        q, scale = -q, -scale
    pingpong, *wanted = ways
    takes = hopper_backward_takes(q, k)
    dq, dkdv = (way and taken for way, taken in zip(wanted, takes, strict=True))
    tiles = tile_lists(q, k, cu_seqlens, plan, causal, window, hopper_tile_sizes(q, k, dq, dkdv), parents)
    lists, context, options = tiles[:3], tiles[3:], (causal, window or 0, softcap or 0.0, scale)
    op = torch.ops.forge_triton.packed_attention_hopper
    return op(q, k, v, *lists, *options, pingpong, dq, dkdv, *context)[0]


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    lse = q.new_empty((1, k.shape[1], q.shape[0] * (q.shape[1] // k.shape[1])), dtype=torch.float32)
    return q.new_empty(q.shape), lse


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, _, dq_tiles, dkdv_tiles, *ctx.options, _, gluon_dq, gluon_dkdv, _, dq_context, dkdv_context = inputs
    ctx.by_gluon = gluon_dq, gluon_dkdv
    ctx.save_for_backward(q, k, v, *output, dq_tiles, dkdv_tiles, dq_context, dkdv_context)
    ctx.mark_non_differentiable(output[1])


def _backward(ops, ctx, dout: Tensor, _dlse: Tensor | None):  # type: ignore[no-untyped-def]
    *saved, dq_context, dkdv_context = ctx.saved_tensors
    arguments, context = (dout, *saved, *ctx.options), (dq_context, dkdv_context)
    if any(ctx.by_gluon):
        gradients = ops.packed_attention_hopper_backward(*arguments, *ctx.by_gluon, *context)
    else:
        gradients = ops.packed_attention_backward(*arguments, *context)
    return *gradients, *[None] * 13


def _fake_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_OPTIONS = "Tensor dq_tiles, Tensor dkdv_tiles, bool causal, int window, float softcap, float scale"
_CONTEXT = "Tensor? dq_context=None, Tensor? dkdv_context=None"

register_op(
    "packed_attention_hopper", _fake, _backward, _setup_context, gpu="packed_attention_hopper",
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor forward_tiles, {_OPTIONS}, "
    f"bool pingpong, bool gluon_dq, bool gluon_dkdv, Tensor? forward_context=None, {_CONTEXT}) -> (Tensor, Tensor)",
)  # fmt: skip
register_op(
    "packed_attention_hopper_backward", _fake_backward, gpu="packed_attention_hopper_backward",
    schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_OPTIONS}, bool gluon_dq, bool gluon_dkdv, {_CONTEXT}) -> (Tensor, Tensor, Tensor)",
)  # fmt: skip
