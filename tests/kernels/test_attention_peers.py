"""Other packages behind packed_attention: what they are called with, and what is said when they cannot be."""

import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from forge_core.kernels import PackPlan, attention_peers, packed_attention, reference
from forge_core.kernels.attention_call import AttentionCall
from forge_core.kernels.attention_peers import PEERS
from forge_core.kernels.registry import Refusal
from tests.tolerance import check_op

BOUNDS, TOKENS = [0, 0, 1, 8, 8, 30, 47, 47], 50


def _documents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: list[int],
    scale: float,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
) -> Tensor:
    """flash-attn's definition: key j is seen when i - left <= j <= i + right, -1 for no limit."""
    assert q.shape[0] == bounds[-1] and scale >= 0  # packages take the largest logit from the largest product
    document = torch.bucketize(torch.arange(q.shape[0]), torch.tensor(bounds), right=True)
    distance = torch.arange(q.shape[0])[:, None] - torch.arange(q.shape[0])
    seen = document[:, None] == document
    seen &= (distance >= 0) | (not causal)
    seen &= (distance <= left) | (left < 0)
    seen &= (-distance <= right) | (right < 0)
    group = q.shape[1] // k.shape[1]
    k_hid, v_hid = (x.transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
    logits = scale * q.transpose(0, 1) @ k_hid.mT
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    return (logits.masked_fill(~seen, -torch.inf).softmax(-1) @ v_hid).transpose(0, 1)


def _fake_flash(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, softmax_scale: float, causal: bool, window_size: tuple[int | None, int | None],
    deterministic: bool, softcap: float = 0.0,
) -> tuple[Tensor, None]:  # fmt: skip
    assert torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k == 22 and deterministic
    left, right = (-1 if side is None else side for side in window_size)
    return _documents(q, k, v, cu_seqlens_q.tolist(), softmax_scale, causal, left, right, softcap), None


def _fake_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float, window_size: tuple[int, int], enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    assert enable_gqa == (query.shape[1] != key.shape[1]) and max_q == 22
    return _documents(query, key, value, cu_seq_q.tolist(), scale, False, *window_size, 0.0)


def _fake_cudnn(
    query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, max_seqlen_q: int,
    max_seqlen_kv: int, scale: float, is_causal: bool, return_lse: bool, window_left: int = -1, window_right: int = -1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """cuDNN's definition: keys from `left` before the query on are out of sight, -1 for no limit."""
    assert return_lse and max_seqlen_q == max_seqlen_kv == 22 and torch.equal(cu_seqlens_q, cu_seqlens_kv)
    assert not (is_causal and window_right > 0)
    left = window_left - 1 if window_left >= 0 else -1
    out = _documents(query, key, value, cu_seqlens_q.tolist(), scale, is_causal, left, window_right, 0.0)
    return out, query.new_zeros(1)


def _fake_varlen_of_torch_2_11(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float, window_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """Takes fewer key/value heads as they come."""
    gqa = query.shape[1] != key.shape[1]
    return _fake_varlen(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size, enable_gqa=gqa
    )


FAKES = {"varlen_attn": _fake_varlen, "cudnn": _fake_cudnn}


@pytest.mark.parametrize("scale", [0.4, -0.4])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 5), (False, 3), (True, 1)])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("name", PEERS)
def test_arguments_mean_the_same(
    monkeypatch: pytest.MonkeyPatch, name: str, kv_heads: int, causal: bool, window: int | None, scale: float
) -> None:
    monkeypatch.setattr(attention_peers, "_load", lambda module, function: FAKES.get(name, _fake_flash))
    torch.manual_seed(0)
    inputs = [
        torch.randn(TOKENS, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, kv_heads, kv_heads)
    ]
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    softcap = 2.0 if PEERS[name].softcap else None
    options = (causal, window, softcap, scale)
    plan = PackPlan(cu_seqlens.numpy())
    out = PEERS[name].run(AttentionCall(*inputs, cu_seqlens, plan, *options))
    expected = reference.packed_attention(*inputs, cu_seqlens, *options)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    for actual, wanted in zip(*(torch.autograd.grad(y, inputs, upstream) for y in (out, expected)), strict=True):
        torch.testing.assert_close(actual, wanted)


def test_varlen_attn_of_torch_2_11_takes_grouped_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_peers, "_load", lambda module, function: _fake_varlen_of_torch_2_11)
    torch.manual_seed(0)
    q, k, v = (torch.randn(TOKENS, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    call = _call()._replace(q=q, k=k, v=v, scale=0.4)
    expected = reference.packed_attention(q, k, v, call.cu_seqlens, True, None, None, 0.4)
    torch.testing.assert_close(PEERS["varlen_attn"].run(call), expected)


def _call(q_heads: int = 4, **options: Any) -> AttentionCall:
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    q, k = torch.ones(TOKENS, q_heads, 8), torch.ones(TOKENS, 2, 8)
    call = AttentionCall(q, k, k, cu_seqlens, PackPlan(cu_seqlens.numpy()), True, None, None, 1.0)
    return call._replace(**options)


@pytest.mark.parametrize("name", PEERS)
def test_the_installed_function_has_these_arguments(name: str) -> None:
    peer = PEERS[name]
    if not attention_peers._installed(peer.package):
        pytest.skip(f"{peer.package} is not installed")
    known = inspect.signature(peer.load()).parameters
    for call in (_call(2), _call(2, causal=False, window=3)):
        assert set(peer.options(call, 22)) <= set(known)
    assert len(peer.refusals()) == 5 + len(peer.errors)


@pytest.mark.skipif(not attention_peers._installed("cudnn"), reason="nvidia-cudnn-frontend is not installed")
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 5), (False, 3)])
def test_the_installed_cudnn_traces_forward_and_backward(causal: bool, window: int | None) -> None:
    with torch._subclasses.FakeTensorMode():
        inputs = [torch.empty(TOKENS, n, 64, dtype=torch.bfloat16, requires_grad=True) for n in (8, 2, 2)]
        cu_seqlens = torch.empty(7, dtype=torch.int32)
        call = AttentionCall(*inputs, cu_seqlens, None, causal, window, None, 0.3)
        out = PEERS["cudnn"].load()(*inputs, **PEERS["cudnn"].options(call, 22))[0]
        gradients = torch.autograd.grad(out, inputs, out)
    assert [x.shape for x in (out, *gradients)] == [inputs[0].shape, *(x.shape for x in inputs)]


def test_a_pack_without_tokens() -> None:
    q = torch.randn(5, 2, 8, requires_grad=True)
    cu_seqlens = torch.tensor([0, 0], dtype=torch.int32)
    call = AttentionCall(q, q, q, cu_seqlens, PackPlan(cu_seqlens.numpy()), True, None, None, 1.0)
    out = PEERS["flash_attn_3"].run(call)
    assert torch.equal(out, torch.zeros(5, 2, 8)) and torch.equal(
        torch.autograd.grad(out.sum(), q)[0], torch.zeros(5, 2, 8)
    )


def _on_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], function: Any) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention_peers, "_installed", lambda package: True)
    monkeypatch.setattr(attention_peers, "_load", lambda module, name: function)
    attention_peers._arguments.cache_clear()


@pytest.fixture(autouse=True)
def _forget_arguments() -> Iterator[None]:
    yield
    attention_peers._arguments.cache_clear()


@pytest.mark.parametrize("name", PEERS)
def test_reasons(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    x, cu_seqlens = torch.ones(4, 2, 8), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match=f"{name}: runs on a CUDA device, got a tensor on cpu"):
        packed_attention(x, x, x, cu_seqlens, backend=name)
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, shape=(4, 2, 300))
    _on_gpu(monkeypatch, (7, 5), lambda q, k, v, causal: q)
    call = AttentionCall(on_gpu, on_gpu, on_gpu, cu_seqlens, None, True, 7, 1.0, 1.0, cu_seqlens)
    found = PEERS[name].not_supported_reasons(call)
    reasons = "; ".join(found)
    for part in (
        "wants compute capability", "takes bfloat16", "head dimensions in steps of 8", "wants plan=", "(parents)",
        f"{PEERS[name].function} of this version has no",
    ):  # fmt: skip
        assert part in reasons
    assert ("has no softcap" in found) == (not PEERS[name].softcap)
    assert ("version has no window_left" in reasons) == (name == "cudnn")

    def broken(module: str, function: str) -> Any:
        raise ImportError("undefined symbol")

    monkeypatch.setattr(attention_peers, "_load", broken)
    attention_peers._arguments.cache_clear()
    assert "cannot be imported: undefined symbol" in PEERS[name].not_supported_reasons(call)[-1]
    monkeypatch.setattr(attention_peers, "_installed", lambda package: False)
    (reason,) = PEERS[name].not_supported_reasons(call)
    assert reason == f"{PEERS[name].package} is not installed"


def test_cudnn_takes_larger_heads_on_hopper_and_does_not_repeat_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def reasons(capability: tuple[int, int], d: int) -> list[str]:
        _on_gpu(monkeypatch, capability, _fake_cudnn)
        q: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=(TOKENS, 4, d))
        return PEERS["cudnn"].not_supported_reasons(_call(q=q, k=q, v=q))

    device = torch.device("cuda")
    assert reasons((9, 0), 256) == [] and "up to 128, got 256" in reasons((10, 0), 256)[0]
    assert "only under torch.use_deterministic_algorithms(True)" in PEERS["cudnn"].unrepeatable(device)[0]
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert reasons((9, 0), 128) == [] == PEERS["cudnn"].unrepeatable(device)
    assert "no repeatable backward pass here" in reasons((8, 0), 128)[0]
    assert PEERS["cudnn"].unrepeatable(device) == ["has no repeatable backward pass on this GPU"]
    assert PEERS["flash_attn_2"].unrepeatable(device) == []


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError("head dim"), Refusal), (torch.OutOfMemoryError("no room"), Refusal), (TypeError("name"), Refusal),
        (AssertionError(), Refusal), (torch.AcceleratorError("illegal address"), torch.AcceleratorError),
        (KeyError("a bug"), KeyError),
    ],
)  # fmt: skip
def test_what_counts_as_a_refusal(monkeypatch: pytest.MonkeyPatch, error: Exception, raised: type[Exception]) -> None:
    def fails(*_: Any, **options: Any) -> Tensor:
        raise error

    monkeypatch.setattr(attention_peers, "_load", lambda module, function: fails)
    with pytest.raises(raised) as caught:
        PEERS["flash_attn_2"].attempt(_call())
    assert raised is not Refusal or str(caught.value).startswith(type(error).__name__)


def test_a_broken_gpu_is_not_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **options: Any) -> Tensor:
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    def synchronize() -> None:
        raise torch.AcceleratorError("illegal memory access")

    monkeypatch.setattr(PEERS["flash_attn_2"].__class__, "run", fails)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    q: Any = SimpleNamespace(is_cuda=True)
    with pytest.raises(torch.AcceleratorError):
        PEERS["flash_attn_2"].attempt(_call(q=q))


@pytest.mark.gpu
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 100)])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("name", PEERS)
def test_matches_reference_on_a_gpu(name: str, d: int, causal: bool, window: int | None) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    bounds, options = [0, 0, 500, 501, 900], {"causal": causal, "window": window}
    inputs = [torch.randn(910, heads, d, dtype=torch.bfloat16, requires_grad=True) for heads in (8, 2, 2)]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    plan, q = PackPlan(cu_seqlens.numpy()), inputs[0].cuda()
    reasons = PEERS[name].not_supported_reasons(
        AttentionCall(q, inputs[1], q, cu_seqlens, plan, causal, window, None, 1.0)
    )
    if reasons:
        pytest.skip("; ".join(reasons))
    check_op(
        lambda q, k, v: packed_attention(q, k, v, cu_seqlens.cuda(), plan=plan, backend=name, **options),
        lambda q, k, v: packed_attention(q, k, v, cu_seqlens, backend="reference", **options),
        inputs,
        device="cuda",
    )
