"""Attention inside the documents of a pack."""

from functools import partial

import torch
from torch import Tensor

from . import attention_choice, attention_hopper, reference
from .attention_call import AttentionCall, list_reasons
from .attention_peers import PEERS
from .gpu.attention_blocks import max_group
from .gpu.attention_tiles import tile_lists
from .library import register_op
from .pack import PackPlan
from .registry import Op, cpp_reasons, no_reasons, triton_reasons

OP = Op("packed_attention")


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    parents: Tensor | None = None,
    plan: PackPlan | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of each token to the tokens of its own document, and of those it continues, in a pack of several.

    `softmax(mask(cap(scale * q k^T))) v` (Vaswani et al., arXiv 1706.03762, equation 1), in float32 (float64 for
    float64 inputs). Query head h reads key/value head `h // (q_heads / kv_heads)` (grouped queries, arXiv 2305.13245).

    Args:
        q: [tokens, q_heads, d], float32, bfloat16, float16 or float64; any strides of tokens and heads.
        k: [tokens, kv_heads, d], dtype of q; q_heads is a multiple of kv_heads.
        v: [tokens, kv_heads, d], dtype of q.
        cu_seqlens: int32 [documents + 1]: document i is rows `cu_seqlens[i]:cu_seqlens[i + 1]`. Starts at 0 and never
            decreases; empty documents are legal. Rows from `cu_seqlens[-1]` on are never read and come back zero, with
            zero gradients.
        parents: int32 [documents]: the document that each one continues, which must come before it, or -1. A document
            sees all rows of its parent, of that one's parent and so on, then its own: with `[-1, 0, 0]` documents 1 and
            2 are two candidates after one prompt, computed once, with the values and gradients of two rows "prompt,
            candidate". A window counts on from the parent, as rope has to: `document_positions` gives the positions.
        plan: PackPlan of these cu_seqlens and parents, made once per pack; without it the op makes its own list of
            tiles: on a GPU by some thirty small kernels, once a call. Any plan serves: its tile sizes, causal and
            window only decide which tiles start first ("cpp") or are replaced ("triton", which uploads it at its first
            use). With parents and without a plan, or compiled, "triton" waits for the GPU to make its lists.
        causal: query i of a document sees keys j <= i; otherwise all of them, and there can be no parents.
        window: query i sees only keys with i - window < j <= i (causal) or |i - j| < window; >= 1.
        softcap: logits become `softcap * tanh(logits / softcap)` before the mask (Gemma 2, arXiv 2408.00118); > 0.
        scale: factor of q k^T; default `d ** -0.5`.
        backend: "auto" tries "cpp" (CPU), "triton", the packages "flash_attn_3", "flash_attn_2", "flash_attn_4",
            "cudnn" and "varlen_attn" (torch's), where they are installed and a plan is given, then "reference". Where
            "triton" can run, the first call of a class of sizes times it, with other block sizes too, against "gluon",
            "gluon_pingpong", "gluon_dkdv" and "gluon_forward" (Hopper) and the packages that repeat bit for bit, and
            remembers the fastest, as FORGE_TUNING says (kernels/gpu/tuning.py). A compiled graph takes no package.
            "cudnn" and "varlen_attn" repeat, and are timed, only under `torch.use_deterministic_algorithms(True)`.

    Returns:
        [tokens, q_heads, d], dtype of q.

    Raises:
        ValueError: shapes or dtypes do not match, cu_seqlens or parents are not as described, window or softcap is out
            of range, or the named backend cannot take the inputs.
    """
    _check_tensors(q, k, v, cu_seqlens)
    _check_parents(parents, cu_seqlens, plan, causal)
    if window is not None and window < 1:
        raise ValueError(f"window: got {window}, expected at least 1 (a query always sees its own key), or None")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: got {softcap}, expected a number above 0, or None")
    scale = q.shape[2] ** -0.5 if scale is None else scale
    call = AttentionCall(q, k, v, cu_seqlens, plan, causal, window, softcap, scale, parents)
    if backend == "auto" and q.is_cuda:
        backend = _measured(call)
    return OP.select(backend, call)(call)


def _measured(call: AttentionCall) -> str:
    """The fastest backend that can take the inputs on this GPU and repeats; "auto" where Triton's cannot."""
    names = ("triton", *attention_hopper.NAMES)
    own = {name: OP.backends[name].run for name in names if not OP.backends[name].not_supported_reasons(call)}
    if "triton" not in own:
        return "auto"
    peers = {}
    if not torch.compiler.is_compiling():  # which could not follow what other packages look up
        for name, peer in PEERS.items():
            if not peer.not_supported_reasons(call) and not peer.unrepeatable(call.q.device):
                peers[name] = peer.attempt
    return attention_choice.fastest(own, peers, call) if len(own) + len(peers) > 1 else "triton"


def document_positions(tokens: int, cu_seqlens: Tensor, parents: Tensor | None = None) -> Tensor:
    """Position of each token of a pack in its document, or behind the documents that this one continues, for rope.

    Args:
        tokens: rows of the pack; those past the last document count on from `cu_seqlens[-1]`.
        cu_seqlens, parents: as in packed_attention. With bounds [0, 3, 5, 6] and parents [-1, 0, 0] the positions are
            0 1 2, 3 4, 3.

    Returns:
        int64 [tokens], on the device of cu_seqlens, which is not waited for.
    """
    index = torch.arange(tokens, device=cu_seqlens.device)
    starts = cu_seqlens.to(torch.int64)
    document = torch.searchsorted(starts, index, right=True) - 1
    offsets = index - starts[document]
    if parents is None or parents.shape[0] == 0:
        return offsets
    # Rows of the 1, 2, 4, ... next ancestors, up to as many as there are documents; the last entry is no document.
    parent = torch.cat([parents, parents.new_full((1,), -1)]).to(torch.int64)
    before = torch.cat([starts.diff(), starts.new_zeros(1)])[parent]
    for _ in range(parents.shape[0].bit_length()):
        before = before + before[parent]
        parent = parent[parent]
    return offsets + before[document]


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> None:
    if q.dim() != 3 or q.shape[1] == 0 or q.shape[2] == 0:
        raise ValueError(f"q: got shape {list(q.shape)}, expected [tokens, q_heads, d]")
    for name, x in (("k", k), ("v", v)):
        if x.dim() != 3 or x.shape[0] != q.shape[0] or x.shape[2] != q.shape[2] or x.shape[1] == 0:
            raise ValueError(
                f"{name}: got shape {list(x.shape)}, expected [tokens, kv_heads, d] with tokens and d of q, "
                f"{list(q.shape)}"
            )
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: got {x.dtype}, expected the dtype of q, {q.dtype}")
    if v.shape != k.shape:
        raise ValueError(f"v: got shape {list(v.shape)}, expected the shape of k, {list(k.shape)}")
    if q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"k: got {k.shape[1]} heads, expected a divisor of the {q.shape[1]} heads of q")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(
            f"cu_seqlens: got {cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}, expected int32 [documents + 1]"
        )
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens: got a tensor on {cu_seqlens.device}, expected the device of q, {q.device}")


def _check_parents(parents: Tensor | None, cu_seqlens: Tensor, plan: PackPlan | None, causal: bool) -> None:
    if plan is not None and (plan.parents is None) != (parents is None):
        made, expected = ("without", "with") if plan.parents is None else ("with", "without")
        raise ValueError(f"plan: got one made {made} parents, expected one {expected} them, as the call")
    if parents is None:
        return
    if parents.dtype != torch.int32 or parents.shape != (cu_seqlens.shape[0] - 1,):
        raise ValueError(
            f"parents: got {parents.dtype} of shape {list(parents.shape)}, expected int32 [documents], here "
            f"[{cu_seqlens.shape[0] - 1}]"
        )
    if parents.device != cu_seqlens.device:
        raise ValueError(
            f"parents: got a tensor on {parents.device}, expected the device of cu_seqlens, {cu_seqlens.device}"
        )
    if not causal:
        raise ValueError("causal: got False with parents: a document would have to see those that continue it")


def _run_cpp(call: AttentionCall) -> Tensor:
    q, k, v, cu_seqlens, plan, causal, window, softcap, scale, parents = call
    tiles = None if plan is None else torch.from_numpy(plan.forward)
    limits = (window or 0, softcap or 0.0)
    return torch.ops.forge.packed_attention(q, k, v, cu_seqlens, tiles, causal, *limits, scale, parents)[0]


def _run_triton(call: AttentionCall) -> Tensor:
    q, k, v, cu_seqlens, plan, causal, window, softcap, scale, parents = call
    if scale < 0:  # the kernels take the largest logit from the largest product
        q, scale = -q, -scale
    tiles = tile_lists(q, k, cu_seqlens, plan, causal, window, parents=parents)
    lists, contexts, options = tiles[:3], tiles[3:], (causal, window or 0, softcap or 0.0, scale)
    call = call._replace(q=q, scale=scale)
    blocks = attention_choice.blocks(call, lists, contexts) if q.is_cuda else [0, 0, 0]
    return torch.ops.forge_triton.packed_attention(q, k, v, *lists, *options, *contexts, blocks=blocks)[0]


def _cpp_reasons(call: AttentionCall) -> list[str]:
    return cpp_reasons(call.q, call.k, call.v)


def _triton_reasons(call: AttentionCall) -> list[str]:
    q, k = call.q, call.k
    reasons = triton_reasons(q, k, call.v)
    if q.shape[2] > 256:
        reasons.append(f"takes head dimensions up to 256, got {q.shape[2]}")
    elif not reasons and q.shape[1] // k.shape[1] > max_group(q):
        reasons.append(
            f"takes up to {max_group(q)} query heads to a key/value head here, got {q.shape[1] // k.shape[1]}"
        )
    reasons += list_reasons(call)
    if q.shape[0] * q.shape[1] >= 2**31:
        reasons.append(f"takes fewer than 2^31 rows, got {q.shape[0]} tokens of {q.shape[1]} heads")
    return reasons


def _run_reference(call: AttentionCall) -> Tensor:
    q, k, v, cu_seqlens, _, causal, window, softcap, scale, parents = call
    return reference.packed_attention(q, k, v, cu_seqlens, causal, window, softcap, scale, parents)


OP.register("cpp", _run_cpp, _cpp_reasons)
OP.register("triton", _run_triton, _triton_reasons)
for _name, _ways in attention_hopper.NAMES.items():
    OP.register(_name, partial(attention_hopper.run, _ways), attention_hopper.reasons)
for _name, _peer in PEERS.items():
    OP.register(_name, _peer.run, _peer.not_supported_reasons)
OP.register("reference", _run_reference, no_reasons)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    tiles: Tensor | None,
    causal: bool,
    window: int,
    softcap: float,
    scale: float,
    parents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float64)


def _fake_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    window: int,
    softcap: float,
    scale: float,
    parents: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, cu_seqlens, _, *ctx.options, parents = inputs
    ctx.save_for_backward(q, k, v, output[1], cu_seqlens, parents)
    ctx.mark_non_differentiable(output[1])


def _backward(ops, ctx, dout: Tensor, _dlse: Tensor | None):  # type: ignore[no-untyped-def]
    *saved, parents = ctx.saved_tensors
    gradients = ops.packed_attention_backward(dout, *saved, *ctx.options, parents)
    return *gradients, None, None, None, None, None, None, None


register_op("packed_attention", _fake, _backward, _setup_context)
register_op("packed_attention_backward", _fake_backward)


# The Triton ops take the tile lists of their three kernels, and keep the output for the backward pass. `blocks` says
# with which of its configurations each kernel runs (attention_blocks.alternatives).
_TILES = "Tensor dq_tiles, Tensor dkdv_tiles, bool causal, int window, float softcap, float scale"
_CONTEXT = "Tensor? dq_context=None, Tensor? dkdv_context=None, int[] blocks=[0, 0, 0]"


def _fake_triton(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    parts = 2 if q.dtype == torch.float32 else 1
    lse = q.new_empty((parts, k.shape[1], q.shape[0] * (q.shape[1] // k.shape[1])), dtype=torch.float32)
    return q.new_empty(q.shape), lse


def _fake_triton_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_triton_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, _, dq_tiles, dkdv_tiles, *ctx.options, _, dq_context, dkdv_context, ctx.blocks = inputs
    ctx.save_for_backward(q, k, v, *output, dq_tiles, dkdv_tiles, dq_context, dkdv_context)
    ctx.mark_non_differentiable(output[1])


def _triton_backward(ops, ctx, dout: Tensor, _dlse: Tensor | None):  # type: ignore[no-untyped-def]
    *saved, dq_context, dkdv_context = ctx.saved_tensors
    gradients = ops.packed_attention_backward(dout, *saved, *ctx.options, dq_context, dkdv_context, blocks=ctx.blocks)
    return *gradients, *[None] * 11


register_op(
    "packed_attention", _fake_triton, _triton_backward, _setup_triton_context, gpu="packed_attention",
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor forward_tiles, {_TILES}, Tensor? forward_context=None, {_CONTEXT})"
    " -> (Tensor, Tensor)",
)  # fmt: skip
register_op(
    "packed_attention_backward", _fake_triton_backward, gpu="packed_attention",
    schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_TILES}, {_CONTEXT}) -> (Tensor, Tensor, Tensor)",
)  # fmt: skip
