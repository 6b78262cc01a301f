"""The Gluon dQ kernel of packed_attention, simulated: values, and the order of its copies, products and barriers."""

import ast
import inspect
import math
import sys
import textwrap
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from forge_core.kernels import library
from tests.gpu import gluon_simulator as simulator

if not library.TRITON_INSTALLED:
    pytest.skip("triton is not installed", allow_module_level=True)

from forge_core.kernels.gpu import attention_hopper_common as common
from forge_core.kernels.gpu import packed_attention_hopper_dq as kernel
from tests.gpu.test_packed_attention_hopper import BOUNDS, TOKENS, TREE, D, _expected, _inputs, _lists, _run

ROWS, BLOCK = 16, 8


def _dq(
    heads: tuple[int, int], causal: bool = True, window: int = 0, d: int = D, *, programs: int = 2, stages: int = 2,
    seed: int = 0, parents: list[int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dQ and delta against autograd through the reference; out and lse as the forward kernel leaves them."""
    q, k, v = _inputs(*heads, d)
    double = [x.double().requires_grad_() for x in (q, k, v)]
    reference_out = _expected(*double, causal, window, parents=parents)
    dout = torch.randn(TOKENS, heads[0], d).bfloat16()
    (expected,) = torch.autograd.grad(reference_out, double[:1], dout.double())
    dout[BOUNDS[-1] :] = torch.nan
    out, lse = _run(q, k, v, causal, window, parents=parents)

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
        *(simulator.Pointer(x) for x in (lse, dq, delta, tiles)), context, d**-0.5 * math.log2(math.e), d**-0.5, TOKENS,
        items, programs, -(-items // programs), dq.stride(0), seed=seed, GROUP=group, KV_HEADS=kv_heads, D=d,
        Q_STAGES=max(1, stages - 1), K_STAGES=stages, V_STAGES=max(1, stages - 1), CAUSAL=causal, WINDOW=window,
        SHARED=context is not None, CONSUMER_REGISTERS=0, PRODUCER_REGISTERS=0,
    )  # fmt: skip
    # P and dS are rounded to bfloat16 before they meet the keys, and out and the result too.
    torch.testing.assert_close(dq.double(), expected, atol=0.06, rtol=0.02)
    sums = (dout.double() * out.double()).sum(-1).nan_to_num().view(TOKENS, kv_heads, group).transpose(0, 1)
    torch.testing.assert_close(delta.double(), sums.reshape(delta.shape), atol=1e-4, rtol=1e-5)
    return dq, delta


@pytest.mark.parametrize(
    ("heads", "causal", "window"),
    [
        ((4, 2), True, 0),
        ((4, 1), False, 0),
        ((3, 1), True, 0),  # a group that is no power of two
        ((2, 2), True, 9),
        ((2, 1), False, 20),
        ((8, 1), True, 1),
    ],
)
def test_values_and_order(heads: tuple[int, int], causal: bool, window: int) -> None:
    for seed in range(3):
        dq, _ = _dq(heads, causal, window, programs=(2, 1, 5)[seed], stages=2 + seed, seed=seed)
    if window == 1:
        assert (dq == 0).all()


@pytest.mark.parametrize("window", [0, 9, 50, 1])
def test_documents_that_continue_others(window: int) -> None:
    for seed in range(3):
        _dq((4, 2), True, window, programs=(2, 1, 5)[seed], stages=2 + seed, seed=seed, parents=TREE)


def test_head_dimensions_below_the_block() -> None:
    _dq((2, 1), d=12)


def test_repeats_bitwise_whoever_comes_first() -> None:
    expected = _dq((4, 1))
    for seed, programs in ((1, 2), (2, 3)):
        for a, b in zip(_dq((4, 1), seed=seed, programs=programs, stages=3), expected, strict=True):
            assert torch.equal(a, b)


STEPS = ("mbarrier.", "warpgroup_mma_wait(", "advance(", "clear_rows(", "fence_async_shared(", "gl.where(")
# Said twice for ptxas, which takes a wait for products up past the exponentials, but not past a branch.
SAID_AGAIN = "mbarrier.wait(q_ready.index(at), q_phase)"


def _steps() -> list[tuple[str, int, str]]:
    """(function, line, text) of every wait, arrival, fence and clear, and of the steps from slot to slot."""
    found, said = [], False
    for name in ("_consume", "_produce", "fetch", "clear_rows"):
        tree = ast.parse(textwrap.dedent(inspect.getsource(_original(name).fn)))
        for node in ast.walk(tree):
            text = ast.unparse(node) if isinstance(node, (ast.Expr, ast.Assign)) else ""
            if any(step in text for step in STEPS) and not (said and text == SAID_AGAIN):
                found.append((name, node.lineno, text))
                said = said or text == SAID_AGAIN
    return found


def _original(name: str) -> Any:
    return getattr(kernel, name, None) or getattr(common, name)


@pytest.mark.parametrize(("function", "line", "text"), _steps())
def test_a_missing_step_is_seen(function: str, line: int, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = _original(function)
    tree = ast.parse(textwrap.dedent(inspect.getsource(original.fn)))
    _Without(line, text).visit(tree)
    assert isinstance(tree.body[0], ast.FunctionDef)
    tree.body[0].decorator_list = []
    module = sys.modules[original.fn.__module__]
    scope = dict(vars(module))
    exec(compile(ast.fix_missing_locations(tree), str(module.__file__), "exec"), scope)
    for place in (kernel, common):
        if hasattr(place, function):
            monkeypatch.setattr(place, function, types.SimpleNamespace(fn=scope[function]))
    with pytest.raises((AssertionError, AttributeError, TypeError, NameError)):  # a sum in flight is no tensor
        for seed in range(8):
            _dq((2, 1), programs=1, stages=2 + seed % 2, seed=seed)


class _Without(ast.NodeTransformer):
    """Replaces the statement of a line by `pass`."""

    def __init__(self, line: int, text: str) -> None:
        self.line, self.text = line, text

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, (ast.Expr, ast.Assign)) and (node.lineno, ast.unparse(node)) == (self.line, self.text):
            return ast.Pass()
        return self.generic_visit(node)
