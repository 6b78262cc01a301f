"""The Gluon dQ kernel of packed_attention, simulated: values, and the order of its copies, products and barriers."""

import pytest
import torch
from torch import Tensor

from forge_core.kernels import library
from tests.gpu import gluon_simulator as simulator
from tests.gpu.gluon_steps import FAILURES, Step, steps, take_out

if not library.TRITON_INSTALLED:
    pytest.skip("triton is not installed", allow_module_level=True)

from forge_core.kernels.gpu import packed_attention_hopper_dq as kernel
from tests.gpu.test_packed_attention_hopper import BOUNDS, TOKENS, TREE, D, _expected, _inputs, _lists, _run

ROWS, BLOCK = 16, 8


def _dq(
    heads: tuple[int, int], causal: bool = True, window: int = 0, softcap: float = 0.0, d: int = D, *,
    programs: int = 2, stages: int = 2, seed: int = 0, parents: list[int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dQ and delta against autograd through the reference; out and lse as the forward kernel leaves them."""
    q, k, v = _inputs(*heads, d)
    double = [x.double().requires_grad_() for x in (q, k, v)]
    reference_out = _expected(*double, causal, window, softcap, parents)
    dout = torch.randn(TOKENS, heads[0], d).bfloat16()
    (expected,) = torch.autograd.grad(reference_out, double[:1], dout.double())
    dout[BOUNDS[-1] :] = torch.nan
    out, lse = _run(q, k, v, causal, window, softcap, parents=parents)

    group, kv_heads = heads[0] // heads[1], heads[1]
    padded = kernel.padded_group(group)
    tiles, context = _lists((ROWS // padded, BLOCK), causal, window, False, parents)
    dq = torch.full(q.shape, float("nan"), dtype=q.dtype)
    delta = torch.full(lse.shape, float("nan"))
    items = tiles.shape[0] * kv_heads
    simulator.run(
        kernel, kernel.hopper_dq_kernel, programs,
        *(simulator.Descriptor(x, [ROWS // 2 // padded, padded, D]) for x in (q, dout, out)),
        *(simulator.Descriptor(x, [BLOCK, 1, D]) for x in (k, v)),
        *(simulator.Pointer(x) for x in (lse, dq, delta, tiles)), context, *kernel._factors(softcap, d**-0.5), d**-0.5,
        TOKENS, items, programs, -(-items // programs), dq.stride(0), seed=seed, GROUP=group, KV_HEADS=kv_heads, D=d,
        Q_STAGES=max(1, stages - 1), K_STAGES=stages, V_STAGES=max(1, stages - 1), CAUSAL=causal, WINDOW=window,
        SOFTCAP=softcap > 0, SHARED=context is not None, CONSUMER_REGISTERS=0, PRODUCER_REGISTERS=0,
    )  # fmt: skip
    # P and dS are rounded to bfloat16 before they meet the keys, and out and the result too.
    torch.testing.assert_close(dq.double(), expected, atol=0.06, rtol=0.02)
    sums = (dout.double() * out.double()).sum(-1).nan_to_num().view(TOKENS, kv_heads, group).transpose(0, 1)
    torch.testing.assert_close(delta.double(), sums.reshape(delta.shape), atol=1e-4, rtol=1e-5)
    return dq, delta


@pytest.mark.parametrize(
    ("heads", "causal", "window", "softcap"),
    [
        ((4, 2), True, 0, 0.0),
        ((4, 1), False, 0, 0.5),
        ((3, 1), True, 0, 0.0),  # a group that is no power of two
        ((2, 2), True, 9, 2.0),
        ((2, 1), False, 20, 0.0),
        ((8, 1), True, 1, 30.0),
    ],
)
def test_values_and_order(heads: tuple[int, int], causal: bool, window: int, softcap: float) -> None:
    for seed in range(3):
        dq, _ = _dq(heads, causal, window, softcap, programs=(2, 1, 5)[seed], stages=2 + seed, seed=seed)
    if window == 1:
        assert (dq == 0).all()


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (9, 2.0), (50, 0.0), (1, 0.0)])
def test_documents_that_continue_others(window: int, softcap: float) -> None:
    for seed in range(3):
        _dq((4, 2), True, window, softcap, programs=(2, 1, 5)[seed], stages=2 + seed, seed=seed, parents=TREE)


def test_head_dimensions_below_the_block() -> None:
    _dq((2, 1), d=12)


def test_repeats_bitwise_whoever_comes_first() -> None:
    expected = _dq((4, 1))
    for seed, programs in ((1, 2), (2, 3)):
        for a, b in zip(_dq((4, 1), seed=seed, programs=programs, stages=3), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("step", steps(kernel.hopper_dq_kernel), ids=str)
def test_a_missing_step_is_seen(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    take_out(step, monkeypatch)
    with pytest.raises(FAILURES):
        for seed in range(8):
            _dq((2, 1), programs=1, stages=2 + seed % 2, seed=seed, parents=TREE if seed > 3 else None)
