"""What "auto" takes on a GPU, and with which blocks: the logic on the CPU, the blocks in Triton's interpreter."""

import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from forge_core.kernels import PackPlan, attention_choice, library, packed_attention, reference
from forge_core.kernels.attention_call import AttentionCall
from forge_core.kernels.attention_peers import PEERS, Peer
from forge_core.kernels.gpu import attention_blocks
from forge_core.kernels.gpu.attention_blocks import Blocks, Kernels, alternatives
from forge_core.kernels.gpu.attention_tiles import tile_lists
from forge_core.kernels.registry import Refusal
from tests.backends import Backend, backends
from tests.tolerance import check_op

module = sys.modules["forge_core.kernels.packed_attention"]
TRITON = [backend for backend in backends("packed_attention") if backend.values[0].name == "triton"]
needs_triton = pytest.mark.skipif(not library.TRITON_INSTALLED, reason="triton is not installed")
BOUNDS = torch.tensor([0, 3, 20], dtype=torch.int32)


def _call(tokens: int = 20, documents: Tensor = BOUNDS, window: int | None = None) -> AttentionCall:
    q, k, v = (torch.randn(tokens, heads, 8, generator=torch.Generator().manual_seed(0)) for heads in (4, 2, 2))
    return AttentionCall(q, k, v, documents, None, True, window, None, 0.3)


def _attend(call: AttentionCall) -> Tensor:
    return reference.packed_attention(*call[:4], *call[5:9])


@pytest.fixture
def tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The real choice, on a machine that says it has a GPU; the ways' times are `tuning.seconds`."""
    from forge_core.kernels.gpu import tuning

    monkeypatch.setenv("FORGE_TUNING_CACHE", str(tmp_path / "tuning.json"))
    monkeypatch.delenv("FORGE_TUNING", raising=False)
    monkeypatch.setattr(tuning, "_choices", None)
    monkeypatch.setattr(tuning, "_on_this_gpu", lambda key: key)
    monkeypatch.setattr(tuning, "seconds", {}, raising=False)
    monkeypatch.setattr(tuning, "_time", mock.Mock(side_effect=lambda ways: {w: tuning.seconds[w] for w in ways}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return tuning


@needs_triton
def test_a_choice_holds_for_a_class_of_sizes(tuning: Any) -> None:
    tuning.seconds = {"triton": 2.0, "other": 1.0}
    for tokens, documents, window in ((50, 3, None), (56, 3, None), (50, 3, 9), (50, 1, None)):
        bounds = torch.arange(documents + 1, dtype=torch.int32) * 5
        call = _call(tokens, bounds, window)
        assert attention_choice.fastest({"triton": _attend, "other": _attend}, {}, call) == "other"
    assert len(tuning._known()) == tuning._time.call_count == 3


@needs_triton
def test_peers_compete_with_the_fastest_of_this_package(tuning: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(call: AttentionCall) -> Tensor:
        raise Refusal("RuntimeError: not on this GPU")

    calls = itertools.count()

    def shakes(call: AttentionCall) -> Tensor:
        return _attend(call) * (1 + 1e-4 * next(calls))

    own = {"triton": _attend, "gluon_like": _attend}
    peers = {"peer": _attend, "refuses": refuses, "off": lambda call: _attend(call) * 1.2, "shakes": shakes}
    tuning.seconds = {"triton": 3.0, "gluon_like": 2.0, "peer": 1.0}
    with pytest.warns(UserWarning) as warned:
        assert attention_choice.fastest(own, peers, _call()) == "peer"
    texts = [str(w.message) for w in warned]
    expected = ("refuses: not used: RuntimeError: not on", "off: not used, its result is off", "shakes: not used, its")
    assert len(texts) == 3 and all(t.startswith(e) for t, e in zip(texts, expected, strict=True)), texts
    assert tuning._time.call_count == 2
    # Nothing is measured again, nor under capture, where a class of sizes that was never measured takes the default.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert attention_choice.fastest(own, peers, _call()) == "peer"
    assert attention_choice.fastest(own, peers, _call(window=3)) == "triton"
    # A compiled graph has no peers: it takes the winner of the others.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert attention_choice.fastest(own, {}, _call()) == "gluon_like"
    assert tuning._time.call_count == 2


@needs_triton
def test_tuning_off_takes_triton(tuning: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_TUNING", "off")
    assert attention_choice.fastest({"triton": _attend, "x": _attend}, {"peer": _attend}, _call()) == "triton"
    assert not tuning._time.called


@needs_triton
def test_only_peers_that_take_the_call_and_repeat_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    x: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=(20, 4, 64), is_cuda=True)
    call = AttentionCall(x, x, x, BOUNDS, PackPlan(BOUNDS.numpy()), True, None, None, 1.0)
    fastest = mock.Mock(return_value="triton")
    monkeypatch.setattr(attention_choice, "fastest", fastest)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(Peer, "not_supported_reasons", lambda self, call: ["no"] if self is PEERS["cudnn"] else [])

    def tried() -> tuple[list[str], list[str]]:
        assert module._measured(call) == "triton"
        own, peers, _ = fastest.call_args.args
        return list(own), list(peers)

    flash = ["flash_attn_3", "flash_attn_2", "flash_attn_4"]
    assert tried()[0][0] == "triton" and tried()[1] == flash
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert tried()[1] == [*flash, "varlen_attn"]
    monkeypatch.setattr(torch, "is_deterministic_algorithms_warn_only_enabled", lambda: True)
    assert tried()[1] == flash
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert tried()[1] == []


@needs_triton
def test_each_kernel_takes_its_own_blocks(tuning: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names = (("f0", "f1"), ("q0",), ("k0", "k1", "k2"))
    monkeypatch.setattr(attention_choice, "alternatives", lambda *_: names)
    calls: list[tuple[str, list[int]]] = []

    def forward(q: Tensor, *_: Any, blocks: list[int]) -> tuple[Tensor, Tensor]:
        calls.append(("forward", blocks))
        return q, q

    def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, blocks: list[int]) -> tuple[Tensor, ...]:
        calls.append(("backward", blocks))
        return q, k, v

    for name, fake in (("packed_attention", forward), ("packed_attention_backward", backward)):
        monkeypatch.setattr(torch.ops.forge_triton, name, fake)
    tuning.seconds = {"f0": 1.0, "f1": 0.5, "k0": 1.0, "k1": 0.7, "k2": 0.6}
    call, lists = _call(), [torch.zeros(1)] * 3
    assert attention_choice.blocks(call, lists, ()) == [1, 0, 0]
    assert all(kind == "forward" for kind, _ in calls) and tuning._time.call_count == 1
    calls.clear()
    call.q.requires_grad_()
    assert attention_choice.blocks(call, lists, ()) == [1, 0, 2]
    assert [blocks for kind, blocks in calls if kind == "forward"] == [[1, 0, 0]]  # once, for all backward ways
    assert {tuple(blocks) for kind, blocks in calls if kind == "backward"} == {(1, 0, 0), (1, 0, 1), (1, 0, 2)}
    calls.clear()
    assert attention_choice.blocks(call, lists, ()) == [1, 0, 2] and not calls
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert attention_choice.blocks(call, lists, ()) == [1, 0, 2] and not calls


@needs_triton
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_break(monkeypatch: pytest.MonkeyPatch, dynamic: bool) -> None:
    from forge_core.kernels.gpu import tuning

    monkeypatch.setattr(attention_blocks, "architecture", lambda device: 90)
    q, k = (torch.ones(50, heads, 64, dtype=torch.bfloat16) for heads in (4, 2))

    def choices(q: Tensor, k: Tensor) -> Tensor:
        call = AttentionCall(q, k, k, BOUNDS, None, True, 7, None, 0.3)
        way = attention_choice.fastest({"triton": _attend, "other": _attend}, {}, call)
        blocks = attention_choice.blocks(call, (), ())
        return q.new_tensor([way == "other", *blocks], dtype=torch.int64)

    call = AttentionCall(q, k, k, BOUNDS, None, True, 7, None, 0.3)
    names = alternatives(q, k, True, None, False)
    key = attention_choice._size_class(call)
    known = {f"packed_attention {key}": "other", f"packed_attention blocks {key} dq": names[1][1]}
    monkeypatch.setattr(tuning, "remembered", lambda key, ways, default: known.get(key, default))
    monkeypatch.setattr(tuning, "choose", mock.Mock(side_effect=AssertionError("measured")))
    compiled = torch.compile(choices, fullgraph=True, dynamic=dynamic, backend="eager")
    assert compiled(q, k).tolist() == [1, 0, 1, 0]


def _table() -> dict[tuple[int, int], Kernels]:
    return {key: table for key, table in attention_blocks._HALF.items() if table.other_forward}


def test_all_blocks_of_a_kernel_fit_the_same_lists() -> None:
    assert (90, 64) in _table() and (90, 128) in _table()
    for key, table in _table().items():
        fits: dict[str, Callable[[Blocks, Blocks], bool]] = {
            "forward": lambda a, b: (a.block_m, a.edge_n) == (b.block_m, b.edge_n) and b.block_n % b.edge_n == 0,
            "dq": lambda a, b: (a.block_m, a.edge_n) == (b.block_m, b.edge_n) and b.block_n % b.edge_n == 0,
            "dkdv": lambda a, b: a.block_n == b.block_n and a.block_m % b.block_m == 0,
        }
        for kernel, fit in fits.items():
            first, *others = table.ways(kernel)
            assert all(fit(first, other) for other in others), (key, kernel)
            assert len(set(map(str, table.ways(kernel)))) == len(others) + 1, (key, kernel)


def test_only_common_calls_have_alternatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_blocks, "architecture", lambda device: 90)

    def count(heads: int, d: int, causal: bool = True, softcap: float | None = None, shared: bool = False) -> bool:
        q, k = (torch.empty(4, n, d, dtype=torch.bfloat16) for n in (heads, 1))
        return any(len(of_kernel) > 1 for of_kernel in alternatives(q, k, causal, softcap, shared))

    assert all(count(heads, d) for heads in (1, 2, 4, 8) for d in (64, 128))
    others = [count(7, 128), count(16, 128), count(4, 96), count(4, 256), count(4, 128, False), count(4, 64, True, 2.0)]
    assert not any([*others, count(4, 64, shared=True)])


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("backend", TRITON)
def test_matches_reference_with_other_blocks(backend: Backend, window: int | None) -> None:
    d = 128 if backend.device == "cuda" else 16
    ways = attention_blocks._ways(torch.device(backend.device), torch.bfloat16, d)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(212, heads, d, generator=generator).bfloat16().requires_grad_() for heads in (4, 2, 2)]
    bounds = torch.tensor([0, 130, 131, 210], dtype=torch.int32)

    def attend(q: Tensor, k: Tensor, v: Tensor, blocks: list[int]) -> Tensor:
        lists = tile_lists(q, k, bounds.to(q.device), None, True, window)
        op = torch.ops.forge_triton.packed_attention
        return op(q, k, v, *lists, True, window or 0, 0.0, 0.3, blocks=blocks)[0]

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.packed_attention(q, k, v, bounds, True, window, None, 0.3)

    from forge_core.kernels.gpu import packed_attention as launcher

    for place in range(1, max(map(len, ways))):
        blocks = [min(place, len(names) - 1) for names in ways]
        with mock.patch.object(launcher, "_sizes", wraps=launcher._sizes) as sizes:
            check_op(partial(attend, blocks=blocks), plain, inputs, device=backend.device)
        ran = [str(call.args[0]) for call in sizes.call_args_list]
        assert ran == [names[i] for names, i in zip(ways, blocks, strict=True)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("planned", [False, True])
def test_auto_measures_once_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planned: bool) -> None:
    from forge_core.kernels.gpu import tuning

    monkeypatch.setenv("FORGE_TUNING_CACHE", str(tmp_path / "tuning.json"))
    monkeypatch.delenv("FORGE_TUNING", raising=False)
    monkeypatch.setattr(tuning, "_choices", None)
    inputs = [torch.randn(900, n, 128, dtype=torch.bfloat16, device="cuda", requires_grad=True) for n in (8, 2, 2)]
    bounds = torch.tensor([0, 700, 703, 880], dtype=torch.int32)

    def attend() -> list[Tensor]:
        plan = PackPlan(bounds.numpy()) if planned else None
        out = packed_attention(*inputs, bounds.cuda(), plan=plan)
        return [out, *torch.autograd.grad(out, inputs, out.detach())]

    expected = attend()
    assert any(" blocks " in key for key in tuning._known())
    with mock.patch.object(tuning, "_time", side_effect=AssertionError("measured again")):
        assert all(torch.equal(a, b) for a, b in zip(attend(), expected, strict=True))
