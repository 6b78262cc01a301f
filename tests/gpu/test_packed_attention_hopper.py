"""The Gluon kernel of packed_attention, simulated: values, and the order of its copies, products and barriers."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from forge_core.kernels import PackPlan, library, reference
from tests.gpu import gluon_simulator as simulator
from tests.gpu.gluon_steps import FAILURES, Step, steps, take_out

if not library.TRITON_INSTALLED:
    pytest.skip("triton is not installed", allow_module_level=True)

from forge_core.kernels.gpu import packed_attention_hopper as hopper
from forge_core.kernels.gpu import packed_attention_hopper_backward as backward

BOUNDS = [0, 37, 37, 38, 111, 126]
TOKENS, D = 133, 16  # a tail of 7 rows
TREE = [-1, 0, 0, 0, 3]  # documents that continue others
ROWS, BLOCK_N, EDGE_N = 16, 16, 8


def _inputs(q_heads: int, kv_heads: int, d: int = D) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(TOKENS, heads, d).bfloat16() for heads in (q_heads, kv_heads, kv_heads))
    for x in (q, k, v):
        x[BOUNDS[-1] :] = torch.nan  # is never to be seen
    return q, k, v


def _run(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = True, window: int = 0, softcap: float = 0.0, *, programs: int = 2,
    stages: int = 2, seed: int = 0, pingpong: bool = False, width: int = D, parents: list[int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    group, kv_heads = q.shape[1] // k.shape[1], k.shape[1]
    padded = hopper.padded_group(group)
    tiles, context = _lists((ROWS // padded, EDGE_N), causal, window, False, parents)
    out = torch.full(q.shape, float("nan"), dtype=q.dtype)
    lse = torch.full((kv_heads, TOKENS * group), float("nan"))
    descriptors = [simulator.Descriptor(q, [ROWS // 2 // padded, padded, width])] + [
        simulator.Descriptor(x, [rows, 1, width]) for rows in (BLOCK_N, EDGE_N) for x in (k, v)
    ]
    items = tiles.shape[0] * kv_heads
    simulator.run(
        hopper, hopper.hopper_forward_kernel, programs, *descriptors, simulator.Pointer(out), simulator.Pointer(lse),
        simulator.Pointer(tiles), context, *hopper._factors(softcap, q.shape[2] ** -0.5), window, TOKENS, items,
        programs, -(-items // programs), out.stride(0), out.stride(1), seed=seed, GROUP=group, KV_HEADS=kv_heads,
        D=q.shape[2], BLOCK_N=BLOCK_N, EDGE_N=EDGE_N, STAGES=stages, Q_STAGES=max(1, stages - 1), CAUSAL=causal,
        WINDOWED=window > 0, SOFTCAP=softcap > 0, SHARED=context is not None, PINGPONG=pingpong, CONSUMER_REGISTERS=0,
        PRODUCER_REGISTERS=0,
    )  # fmt: skip
    return out, lse


def _lists(
    tile: tuple[int, int], causal: bool, window: int, backward: bool, parents: list[int] | None
) -> tuple[Tensor, simulator.Pointer | None]:
    """Tiles, and with parents their context."""
    plan = PackPlan(np.array(BOUNDS, np.int32), parents=np.array(parents, np.int32) if parents else None)
    tiles, context = plan.tiles_and_context(
        *tile, backward=backward, causal=causal, window=window or None, tokens=TOKENS
    )
    return torch.from_numpy(tiles), simulator.Pointer(torch.from_numpy(context)) if context is not None else None


def _expected(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int, softcap: float = 0.0, parents: list[int] | None = None
) -> Tensor:
    return reference.packed_attention(
        q, k, v, torch.tensor(BOUNDS, dtype=torch.int32), causal, window or None, softcap or None, q.shape[2] ** -0.5,
        torch.tensor(parents, dtype=torch.int32) if parents else None,
    )  # fmt: skip


def _check(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, causal: bool, window: int, softcap: float,
    parents: list[int] | None = None,
) -> None:  # fmt: skip
    expected = _expected(*(x.double() for x in (q, k, v)), causal, window, softcap, parents)
    # P is rounded to bfloat16 before it meets the values, and so is the result.
    torch.testing.assert_close(out.double(), expected, atol=0.02, rtol=0.01)


@pytest.mark.parametrize("pingpong", [False, True])
@pytest.mark.parametrize(
    ("heads", "causal", "window", "softcap"),
    [
        ((4, 2), True, 0, 0.0),
        ((4, 1), False, 0, 0.0),
        ((3, 1), True, 0, 0.0),  # a group that is no power of two
        ((2, 2), True, 9, 2.0),
        ((2, 1), False, 20, 0.0),
        ((8, 1), True, 1, 0.0),
    ],
)
def test_values_and_order(heads: tuple[int, int], causal: bool, window: int, softcap: float, pingpong: bool) -> None:
    q, k, v = _inputs(*heads)
    for seed in range(3):
        stages, programs = 1 + seed, (2, 1, 5)[seed]
        out, _ = _run(q, k, v, causal, window, softcap, programs=programs, stages=stages, seed=seed, pingpong=pingpong)
        _check(q, k, v, out, causal, window, softcap)


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (9, 2.0), (50, 0.0), (1, 0.0)])
def test_documents_that_continue_others(window: int, softcap: float) -> None:
    q, k, v = _inputs(4, 2)
    for seed in range(3):
        out, _ = _run(
            q, k, v, True, window, softcap, programs=(2, 1, 5)[seed], stages=1 + seed, seed=seed,
            pingpong=bool(seed % 2), parents=TREE,
        )  # fmt: skip
        _check(q, k, v, out, True, window, softcap, TREE)


def test_head_dimensions_below_the_block() -> None:
    q, k, v = _inputs(2, 1, 12)
    out, _ = _run(q, k, v)
    _check(q, k, v, out, True, 0, 0.0)


def test_repeats_bitwise_whoever_comes_first() -> None:
    inputs = _inputs(4, 1)
    expected = _run(*inputs)
    for seed, programs in ((1, 2), (2, 3)):
        for a, b in zip(_run(*inputs, seed=seed, programs=programs, pingpong=bool(seed % 2)), expected, strict=True):
            assert torch.equal(a, b)


def test_lse_is_what_the_backward_pass_reads() -> None:
    q, k, v = _inputs(4, 2)
    _, lse = _run(q, k, v)
    logits = torch.einsum("qhd,khd->hqk", q.double(), k.repeat_interleave(2, 1).double()) * D**-0.5
    document = torch.bucketize(torch.arange(TOKENS), torch.tensor(BOUNDS), right=True)
    seen = (document[:, None] == document) & torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    expected = logits.masked_fill(~seen, -torch.inf).logsumexp(-1) / math.log(2)
    actual = lse.view(2, TOKENS, 2).permute(0, 2, 1).reshape(4, TOKENS)
    torch.testing.assert_close(actual[:, : BOUNDS[-1]].double(), expected[:, : BOUNDS[-1]], atol=1e-4, rtol=1e-5)
    assert (actual[:, BOUNDS[-1] :] == 0).all()


def _gradients(
    heads: tuple[int, int], causal: bool, window: int, softcap: float = 0.0, *, programs: int = 2, stages: int = 2,
    seed: int = 0, parents: list[int] | None = None, small: bool = False,
) -> None:  # fmt: skip
    """dK and dV against autograd through the reference; lse, out and delta as the kernels before leave them."""
    q, k, v = _inputs(*heads)
    double = [x.double().requires_grad_() for x in (q, k, v)]
    out = _expected(*double, causal, window, softcap, parents)
    dout = torch.randn(TOKENS, heads[0], D).bfloat16()
    expected = torch.autograd.grad(out, double[1:], dout.double())
    group, kv_heads = heads[0] // heads[1], heads[1]
    delta = (dout.double() * out.detach()).sum(-1).view(TOKENS, kv_heads, group).transpose(0, 1).float()
    dout[BOUNDS[-1] :] = torch.nan
    _, lse = _run(q, k, v, causal, window, softcap, parents=parents)

    edge = BLOCK_N // 2 // group
    cols = edge if small else 2 * edge
    tiles, context = _lists((ROWS, edge), causal, window, True, parents)
    dk, dv = (torch.full(x.shape, float("nan"), dtype=x.dtype) for x in (k, v))
    queries = [
        simulator.Descriptor(x, block)
        for rows in (cols, edge)
        for x, block in (
            (q, [rows, group, D]), (dout, [rows, group, D]), (lse.reshape(-1), [rows * group]),
            (delta.reshape(-1), [rows * group]),
        )
    ]  # fmt: skip
    items = tiles.shape[0] * kv_heads
    simulator.run(
        backward, backward.hopper_dkdv_kernel, programs, *queries,
        *(simulator.Descriptor(x, [ROWS // 2, 1, D]) for x in (k, v)), simulator.Pointer(dk),
        simulator.Pointer(dv), simulator.Pointer(tiles), context, *hopper._factors(softcap, D**-0.5), D**-0.5, TOKENS,
        items, programs, -(-items // programs), seed=seed, GROUP=group, KV_HEADS=kv_heads, D=D, COLS=cols, EDGE=edge,
        STAGES=stages, CAUSAL=causal, WINDOW=window, SOFTCAP=softcap > 0, SHARED=context is not None,
        CONSUMER_REGISTERS=0, PRODUCER_REGISTERS=0,
    )  # fmt: skip
    for actual, wanted in zip((dk, dv), expected, strict=True):
        # P and dS are rounded to bfloat16 before they meet dout and q.
        torch.testing.assert_close(actual.double(), wanted, atol=0.06, rtol=0.02)


@pytest.mark.parametrize(
    ("heads", "causal", "window", "softcap"),
    [
        ((4, 2), True, 0, 0.0),
        ((4, 1), False, 0, 0.5),
        ((2, 2), True, 9, 2.0),
        ((2, 1), False, 20, 0.0),
        ((8, 1), True, 1, 30.0),
    ],
)
def test_gradients_of_keys_and_values(heads: tuple[int, int], causal: bool, window: int, softcap: float) -> None:
    for seed in range(3):
        _gradients(
            heads, causal, window, softcap, programs=(2, 1, 5)[seed], stages=1 + seed, seed=seed, small=seed == 1
        )


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (9, 2.0), (50, 0.0), (1, 0.0)])
def test_gradients_of_documents_that_continue_others(window: int, softcap: float) -> None:
    for seed in range(3):
        _gradients(
            (4, 2), True, window, softcap, programs=(2, 1, 5)[seed], stages=1 + seed, seed=seed, parents=TREE,
            small=seed == 1,
        )  # fmt: skip


@pytest.mark.parametrize("step", steps(backward.hopper_dkdv_kernel), ids=str)
def test_a_missing_step_of_the_backward_pass_is_seen(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    take_out(step, monkeypatch)
    with pytest.raises(FAILURES):
        for seed in range(8):
            _gradients((2, 1), True, 0, programs=1, stages=1 + seed % 2, seed=seed, parents=TREE if seed > 3 else None)


@pytest.mark.parametrize("step", steps(hopper.hopper_forward_kernel), ids=str)
def test_a_missing_step_is_seen(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    take_out(step, monkeypatch)
    q, k, v = _inputs(4, 1)
    with pytest.raises(FAILURES):
        for seed in range(8):
            parents = TREE if seed > 3 else None
            out, _ = _run(q, k, v, seed=seed, programs=1, stages=1 + seed % 2, pingpong=True, parents=parents)
            _check(q, k, v, out, True, 0, 0.0, parents)
