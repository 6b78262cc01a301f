"""The peers written here must compute the same as forge_core: a benchmark against something else says nothing."""

import pytest
import torch

from bench import flops
from bench.gpu import sft_step as llama_bench
from bench.ops import lora_linear as lora_bench
from bench.ops import packed_attention as attention_bench
from bench.ops import weighted_linear_cross_entropy as loss_bench
from bench.peers import lora
from bench.registry import Missing, Slow
from forge_core.model import ModelConfig


@pytest.mark.parametrize("function", [lora.peft, lora.unsloth_style, lora.lorafusion_scheme])
def test_lora_peers_have_the_right_gradients(function) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    x, a, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((5, 6), (2, 6), (4, 2)))
    weight = torch.randn(4, 6, dtype=torch.float64)
    expected = x @ weight.T + 2.0 * (x @ a.T) @ b.T
    torch.testing.assert_close(function(x, weight, a, b, 2.0), expected)
    assert torch.autograd.gradcheck(lambda *inputs: function(inputs[0], weight, *inputs[1:], 2.0), (x, a, b))


@pytest.mark.parametrize("function", [lora.unsloth_style, lora.lorafusion_scheme])
def test_lora_peers_drop_the_same_elements_forward_and_backward(function) -> None:  # type: ignore[no-untyped-def]
    x, a, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((5, 6), (2, 6), (4, 2)))
    weight = torch.zeros(4, 6, dtype=torch.float64)

    def seeded(*inputs: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return function(inputs[0], weight, *inputs[1:], 2.0, 0.5)

    assert torch.autograd.gradcheck(seeded, (x, a, b))


def _run(candidates: dict) -> dict[str, object]:  # type: ignore[type-arg]
    calls = {name: c.call if isinstance(c, Slow) else c for name, c in candidates.items() if not isinstance(c, Missing)}
    return {name: call() for name, call in calls.items()}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gpu_layer_workload_runs_on_a_small_shape(dropout: float) -> None:
    done = _run(lora_bench.layers(16, [(32, (32, 16, 16)), (48, (32,))], 4, dropout, "cpu", compile=False))
    assert set(done) >= {"forge", "floor: frozen matmuls", "PEFT default", "Unsloth-style", "LoRAFusion's scheme"}


def test_attention_peers_agree() -> None:
    torch.manual_seed(0)
    pack = attention_bench.Pack(256, 4, 2, 32, mean=40)
    candidates = attention_bench.candidates(pack, False, "cpu", varlen=False)
    assert sum(pack.lengths()) == 256 and min(pack.lengths()) > 0
    del candidates["FlexAttention"]  # compiles
    done = _run(candidates)
    for name in ("SDPA per document", "SDPA block mask"):
        torch.testing.assert_close(done[name], done["forge"], atol=0.02, rtol=0.02)


def test_loss_peers_agree() -> None:
    torch.manual_seed(0)
    candidates = loss_bench.candidates(48, 32, 96, 24, True, "cpu")
    assert candidates["Liger"] == Missing("liger_kernel is not installed") or candidates["Liger"]
    del candidates["full logits compiled"]
    (ours,), (theirs,) = candidates["forge"](), candidates["full logits"]()  # type: ignore[operator,misc]
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0.02)


def test_gpu_step_runs_on_a_small_model_and_trains_the_same_tokens() -> None:
    tiny = llama_bench.MODELS["Llama-3-8B"] | {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    pack = attention_bench.Pack(64, 0, 0, 0, mean=16)
    llama_bench.RANK = 2
    llama_bench.forge(tiny, pack, "cpu")()
    llama_bench.transformers_peft(tiny, pack, "cpu")()
    _, targets, weights = llama_bench._inputs(96, pack, "cpu")
    assert 0 < weights.sum() < 64 and torch.equal(weights != 0, targets != -100)


def test_flops_of_a_step_are_four_per_weight_and_token() -> None:
    raw = llama_bench.MODELS["Llama-3-8B"]
    weights = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 4096 * 128256
    config = ModelConfig.from_dict(raw)
    no_adapter, tokens = flops.lora_step(config, [1] * 100, 100, 0), 100
    assert no_adapter == pytest.approx(4 * weights * tokens, rel=1e-3)  # documents of one token: next to no attention
    assert flops.lora_step(config, [100], 100, 0) > no_adapter
