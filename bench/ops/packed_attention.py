"""packed_attention on packs of log-normal documents, against SDPA, FlexAttention and the varlen kernels."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from bench.peers import attention as peers
from bench.registry import Candidates, Missing, Slow, Thunk, peer, suite_device, workload
from forge_core.kernels import PackPlan, attention_hopper, packed_attention
from forge_core.kernels.attention_call import AttentionCall
from forge_core.kernels.attention_peers import PEERS
from forge_core.kernels.registry import OPS


@dataclass(frozen=True)
class Pack:
    """A pack and its heads; `longest` cuts the log-normal lengths."""

    tokens: int
    q_heads: int
    kv_heads: int
    d: int
    mean: int = 330
    longest: int = 1 << 30

    def lengths(self, seed: int = 0) -> list[int]:
        """Log-normal lengths (sigma 1) that fill `tokens` exactly."""
        generator = np.random.default_rng(seed)
        lengths: list[int] = []
        while sum(lengths) < self.tokens:
            lengths.append(min(self.longest, max(8, int(generator.lognormal(np.log(self.mean) - 0.5, 1.0)))))
        lengths[-1] -= sum(lengths) - self.tokens
        return lengths


PACKS = {
    "cpu": [Pack(8192, 16, 4, 64), Pack(8192, 16, 4, 128)],
    "gpu": [
        Pack(8192, 32, 8, 128, mean=600, longest=2048),
        Pack(32768, 32, 8, 128, mean=2000, longest=8192),
        Pack(8192, 16, 4, 64),
    ],
}


def candidates(pack: Pack, backward: bool, device: str, varlen: bool) -> Candidates:
    """forge and its peers on one pack; with `varlen` also the kernels that only GPUs have."""
    lengths = pack.lengths()
    shape = (pack.tokens, pack.q_heads, pack.d)
    q = torch.randn(*shape, dtype=torch.bfloat16, device=device, requires_grad=backward)
    k, v = (
        torch.randn(pack.tokens, pack.kv_heads, pack.d, dtype=torch.bfloat16, device=device, requires_grad=backward)
        for _ in range(2)
    )
    upstream = torch.randn_like(q)
    host = np.array([0, *np.cumsum(lengths)], np.int32)
    cu_seqlens, plan = torch.tensor(host, device=device), PackPlan(host)  # the trainer makes the plan once per batch

    def candidate(function) -> Thunk:  # type: ignore[no-untyped-def]
        return peers.with_backward(function, (q, k, v), upstream) if backward else function

    few = 1 if device == "cpu" else 0  # rounds: there a call of FlexAttention takes up to 25 s
    result: Candidates = {
        "forge": candidate(lambda: packed_attention(q, k, v, cu_seqlens, plan=plan)),
        "SDPA per document": candidate(lambda: peers.sdpa_per_document(q, k, v, lengths)),
        "FlexAttention": peer("torch", lambda: candidate(peers.flex_attention(q, k, v, lengths)), rounds=few),
    }
    if pack.tokens <= 8192:  # beyond, the mask alone is a GiB
        mask = peers.block_mask(lengths, device)
        masked = candidate(lambda: peers.sdpa_block_mask(q, k, v, mask))
        result["SDPA block mask"] = Slow(masked, 1) if device == "cpu" else masked  # up to 16 s a call
    if varlen:
        # "forge" is whichever of these was measured to be faster on this GPU (kernels/attention_choice.py); other
        # packages' backends take part where they repeat bit for bit.
        for name in ("triton", *attention_hopper.NAMES, "cudnn"):
            arguments = AttentionCall(q, k, v, cu_seqlens, plan, True, None, None, pack.d**-0.5)
            reasons = OPS["packed_attention"].backends[name].not_supported_reasons(arguments)
            call = partial(packed_attention, q, k, v, cu_seqlens, plan=plan, backend=name)
            label = name if name in PEERS else f"forge {name}"
            result[label] = Missing("; ".join(reasons)) if reasons else candidate(call)
        inputs = (q, k, v, cu_seqlens, max(lengths))
        result["torch varlen_attn"] = peer("torch", lambda: candidate(peers.torch_varlen(*inputs)))
        for name, module in peers.FLASH_ATTN.items():
            result[name] = peer(module, lambda name=name: candidate(peers.flash_attn(name, *inputs)))
    return result


def _register(suite: str, pack: Pack, backward: bool) -> None:
    device = suite_device(suite)
    lengths = pack.lengths()
    area = sum(n * (n + 1) / 2 for n in lengths)
    passes = 3.5 if backward else 1.0  # backward counted as 2.5 times the forward
    io = 2.0 * pack.tokens * pack.d * (2 * pack.q_heads + 2 * pack.kv_heads)
    aims = {"SDPA per document": 2.5, "SDPA block mask": 20.0}

    @workload(
        "packed_attention",
        f"{pack.tokens} tokens, {len(lengths)} documents up to {max(lengths)}, {pack.q_heads}/{pack.kv_heads} heads, "
        f"D {pack.d} {'fwd+bwd' if backward else 'fwd'}",
        suite=suite,
        flops=passes * 4.0 * pack.d * pack.q_heads * area,
        bytes=io * (3 if backward else 1),
        at_least=aims if suite == "cpu" else {"torch varlen_attn": 1.35, "FlexAttention": 1.8},
        headline=backward,
    )
    def build() -> Candidates:
        return candidates(pack, backward, device, varlen=suite == "gpu")


for suite, packs in PACKS.items():
    for pack in packs:
        for backward in (False, True):
            _register(suite, pack, backward)
