"""The arithmetic of the CUDA rows of linear_token_logprobs and policy_gradient_loss, thread by thread on the CPU."""

import pytest
import torch
from torch import Tensor

from tests.tolerance import assert_as_accurate

# vocab, blocks of a cluster: one pack and less, a block without packs, the last pack not full, several packs a thread.
SIZES = [(1, 1), (3, 2), (5, 8), (64, 1), (515, 2), (4100, 1), (5003, 4), (9000, 2), (40001, 8)]
CAPS = [(0.0, 1.0), (0.0, 0.7), (2.0, 1.3)]  # softcap, temperature
CLIP, CISPO, REINFORCE = range(3)
LOWER, UPPER, KL, ENTROPY = 0.6, 2.0, 0.3, 0.2
TOKENS = 16


def _inputs(vocab: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(TOKENS, vocab, generator=g)
    z[0, -1] = z[0].max() + 1  # the largest logit last
    z[1] = 1.5
    return {
        "z": z,
        "targets": torch.randint(vocab, (TOKENS,), generator=g),
        "g": torch.randn(TOKENS, generator=g),
        "h": torch.randn(TOKENS, generator=g),
        "weights": torch.rand(TOKENS, generator=g) + 0.1,
        "noise": torch.randn(2, TOKENS, generator=g),
    }


def _logprobs(z: Tensor, targets: Tensor, softcap: float, temperature: float) -> tuple[Tensor, Tensor]:
    y = (softcap * torch.tanh(z / softcap) if softcap else z) / temperature
    logp = torch.log_softmax(y, 1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(1)


def _buffers(z: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits, and their gradient where the launchers put it: in the upper half of the logits, or over them."""
    n, vocab = z.shape
    stride = -(-vocab // 16) * 16
    logits = torch.full((n, stride), float("nan"))
    logits[:, :vocab] = z
    dz = logits.view(dtype)[:, stride : stride + vocab] if dtype == torch.bfloat16 else logits[:, :vocab]
    return logits[:, :vocab], dz


def _run(
    z: Tensor, dz: Tensor | None, targets: Tensor, blocks: int, cap: tuple[float, float], *, count: int = TOKENS,
    objective: int = 0, coefficients: tuple[float, ...] = (1.0, 1.0, 0.0, 0.0), **tensors: Tensor | None,
) -> None:  # fmt: skip
    names = (
        "logprob",
        "entropy",
        "log_ratio",
        "dlogprob",
        "dentropy",
        "advantages",
        "old",
        "ref",
        "weights",
        "inverse",
    )
    assert set(tensors) <= set(names)
    torch.ops.forge.token_logprob_rows(
        z, dz, torch.arange(len(z), dtype=torch.int32), torch.tensor([count], dtype=torch.int32), targets,
        *(tensors.get(name) for name in names), objective, *coefficients, *cap, 0, blocks, 2,
    )  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_given_gradients_match_torch(size: tuple[int, int], cap: tuple[float, float], dtype: torch.dtype) -> None:
    vocab, blocks = size
    given = _inputs(vocab)
    logprob, entropy = torch.zeros(TOKENS, dtype=torch.float64), torch.zeros(TOKENS)
    z, dz = _buffers(given["z"], dtype)
    _run(z, None, given["targets"], blocks, cap, logprob=logprob, entropy=entropy)
    assert torch.equal(z, given["z"])  # without a gradient logits stay
    _run(z, dz, given["targets"], blocks, cap, dlogprob=given["g"], dentropy=given["h"])

    def expected(dtype: torch.dtype) -> tuple[Tensor, ...]:
        z = given["z"].to(dtype).requires_grad_()
        outputs = _logprobs(z, given["targets"], *cap)
        upstream = given["g"].to(dtype), given["h"].to(dtype)
        return *(x.detach() for x in outputs), torch.autograd.grad(outputs, z, upstream)[0]

    plain, exact = expected(torch.float32), expected(torch.float64)
    assert_as_accurate("logprob", logprob.float(), plain[0], exact[0])
    assert_as_accurate("entropy", entropy, plain[1], exact[1])
    assert_as_accurate("dz", dz, plain[2].to(dtype), exact[2])


@pytest.mark.parametrize("size", [(5, 8), (515, 2), (5003, 4)])
@pytest.mark.parametrize("objective", [CLIP, CISPO, REINFORCE])
def test_objectives_match_torch(size: tuple[int, int], objective: int) -> None:
    vocab, blocks = size
    given, cap = _inputs(vocab), (2.0, 1.3)
    now = _logprobs(given["z"].double(), given["targets"], *cap)[0]
    # On both sides of both bounds, none so near to one that rounding decides.
    old = (now + torch.tensor([-1.3, -0.3, 0.3, 1.3]).repeat(TOKENS // 4) + 0.05 * given["noise"][0]).float()
    ref, inverse = (now + given["noise"][1]).float(), torch.tensor([0.25], dtype=torch.float64)
    logprob, log_ratio = (torch.zeros(TOKENS, dtype=torch.float64) for _ in range(2))
    z, dz = _buffers(given["z"], torch.float32)
    _run(
        z, dz, given["targets"], blocks, cap, objective=objective, coefficients=(LOWER, UPPER, KL, ENTROPY),
        logprob=logprob, entropy=torch.zeros(TOKENS), log_ratio=log_ratio, advantages=given["g"], old=old, ref=ref,
        weights=given["weights"], inverse=inverse,
    )  # fmt: skip

    def expected(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        z = given["z"].to(dtype).requires_grad_()
        logprob, entropy = _logprobs(z, given["targets"], *cap)
        log_ratio, difference, a = logprob - old.to(dtype), ref.to(dtype) - logprob, given["g"].to(dtype)
        ratio = log_ratio.exp()
        bounded = ratio.clamp(LOWER, UPPER)
        loss = (
            -torch.minimum(ratio * a, bounded * a),
            -bounded.detach() * a * logprob,
            -a * logprob,
        )[objective]
        loss = loss + KL * (difference.exp() - difference - 1) - ENTROPY * entropy
        return log_ratio.detach(), torch.autograd.grad((given["weights"].to(dtype) * loss).sum() * 0.25, z)[0]

    plain, exact = expected(torch.float32), expected(torch.float64)
    assert_as_accurate("log_ratio", log_ratio.float(), plain[0], exact[0])
    assert_as_accurate("dz", dz, plain[1], exact[1])


def test_rows_behind_the_last_that_counts_are_cleared() -> None:
    given = _inputs(100)
    logprob, entropy = torch.zeros(TOKENS, dtype=torch.float64), torch.zeros(TOKENS)
    z, dz = _buffers(given["z"], torch.float32)
    one = torch.ones(1, dtype=torch.float64)
    _run(
        z, dz, given["targets"], 2, (0.0, 1.0), count=3, objective=REINFORCE, logprob=logprob, entropy=entropy,
        advantages=given["g"], inverse=one,
    )  # fmt: skip
    assert not dz[3:].any() and dz[:3].abs().max() > 0
    assert not logprob[3:].any() and logprob[:3].all() and not entropy[3:].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprob": None}, "entropy: .*expected logprob and entropy"),
        ({"dlogprob": torch.zeros(2)}, "dentropy: .*both or none"),
        ({"advantages": None}, "dlogits: .*advantages and inverse"),
        ({"advantages": torch.zeros(1)}, "advantages: .*at least 2"),
    ],
)
def test_arguments_are_checked(change: dict, message: str) -> None:
    z, f64 = torch.zeros(2, 8), torch.ones(2, dtype=torch.float64)
    tensors = {"logprob": f64, "entropy": torch.zeros(2), "advantages": torch.zeros(2), "inverse": f64} | change
    with pytest.raises(ValueError, match=message):
        _run(z, z, torch.zeros(2, dtype=torch.int64), 1, (0.0, 1.0), **tensors)
