"""Other packages behind packed_attention: what they are called with, and what is said when they cannot be."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from forge_core.kernels import PackPlan, attention_peers, packed_attention, reference
from forge_core.kernels.attention_call import AttentionCall
from forge_core.kernels.attention_peers import PEERS
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
    assert q.shape[0] == bounds[-1]
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


def _fake_flash(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> tuple[Tensor, None]:
    cu_q, cu_k, max_q, max_k = args
    assert torch.equal(cu_q, cu_k) and max_q == max_k == 22 and options["deterministic"]
    left, right = (-1 if side is None else side for side in options["window_size"])
    return _documents(
        q, k, v, cu_q.tolist(), options["softmax_scale"], options["causal"], left, right, options["softcap"]
    ), None


def _fake_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float, window_size: tuple[int, int], enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    assert enable_gqa == (query.shape[1] != key.shape[1]) and max_q == 22
    return _documents(query, key, value, cu_seq_q.tolist(), scale, False, *window_size, 0.0)


@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 5), (False, 3), (True, 1)])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("name", PEERS)
def test_arguments_mean_the_same(
    monkeypatch: pytest.MonkeyPatch, name: str, kv_heads: int, causal: bool, window: int | None
) -> None:
    fake = _fake_varlen if name == "varlen_attn" else _fake_flash
    monkeypatch.setattr(attention_peers, "_load", lambda module, function: fake)
    torch.manual_seed(0)
    inputs = [
        torch.randn(TOKENS, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, kv_heads, kv_heads)
    ]
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    softcap = 2.0 if PEERS[name].softcap else None
    options = (causal, window, softcap, 0.4)
    plan = PackPlan(cu_seqlens.numpy())
    out = PEERS[name].run(AttentionCall(*inputs, cu_seqlens, plan, *options))
    expected = reference.packed_attention(*inputs, cu_seqlens, *options)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    for actual, wanted in zip(*(torch.autograd.grad(y, inputs, upstream) for y in (out, expected)), strict=True):
        torch.testing.assert_close(actual, wanted)


def test_a_pack_without_tokens() -> None:
    q = torch.randn(5, 2, 8, requires_grad=True)
    cu_seqlens = torch.tensor([0, 0], dtype=torch.int32)
    call = AttentionCall(q, q, q, cu_seqlens, PackPlan(cu_seqlens.numpy()), True, None, None, 1.0)
    out = PEERS["flash_attn_3"].run(call)
    assert torch.equal(out, torch.zeros(5, 2, 8)) and torch.equal(
        torch.autograd.grad(out.sum(), q)[0], torch.zeros(5, 2, 8)
    )


@pytest.mark.parametrize("name", PEERS)
def test_reasons(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    x, cu_seqlens = torch.ones(4, 2, 8), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match=f"{name}: runs on a CUDA device, got a tensor on cpu"):
        packed_attention(x, x, x, cu_seqlens, backend=name)
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, shape=(4, 2, 300))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(attention_peers, "_installed", lambda package: True)
    monkeypatch.setattr(attention_peers, "_load", lambda module, function: lambda q, k, v: q)
    call = AttentionCall(on_gpu, on_gpu, on_gpu, cu_seqlens, None, True, None, 1.0, 1.0)
    reasons = "; ".join(PEERS[name].not_supported_reasons(call))
    for part in ("wants compute capability", "takes bfloat16", "head dimensions in steps of 8", "wants plan="):
        assert part in reasons
    assert ("has no softcap" in reasons) == (not PEERS[name].softcap)
    assert ("no window_size" in reasons) == (name == "varlen_attn")
    monkeypatch.setattr(attention_peers, "_installed", lambda package: False)
    (reason,) = PEERS[name].not_supported_reasons(call)
    assert reason == f"{PEERS[name].package} is not installed"


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
