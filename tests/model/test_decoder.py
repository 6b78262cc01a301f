from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from forge_core.model import CausalLM, LoraConfig, ModelConfig, adapter_parameters, add_lora, load_model
from forge_core.model.layers import Embedding

from .tiny import SIZES, VARIANTS, documents, relative_error, save_peer, transformers_logits

LENGTHS = (23, 1, 40, 0, 17)


# transformers computes norms, rotary tables and softmax in float32 whatever the weights are.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 2e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_those_of_transformers(tmp_path: Path, name: str, dtype: torch.dtype, bound: float) -> None:
    peer = save_peer(tmp_path, name, dtype)
    model = load_model(tmp_path, dtype=dtype)
    input_ids, cu_seqlens = documents(*LENGTHS)
    expected = transformers_logits(peer, input_ids, cu_seqlens)
    assert relative_error(model.logits(model(input_ids, cu_seqlens)), expected) < bound


def test_bfloat16_is_as_close_to_float32_as_transformers_is(tmp_path: Path) -> None:
    exact = save_peer(tmp_path, "llama")
    input_ids, cu_seqlens = documents(*LENGTHS)
    expected = transformers_logits(exact, input_ids, cu_seqlens)
    model = load_model(tmp_path)
    assert model.lm_head_weight.dtype == torch.bfloat16
    theirs = relative_error(transformers_logits(exact.to(torch.bfloat16), input_ids, cu_seqlens), expected)
    assert relative_error(model.logits(model(input_ids, cu_seqlens)), expected) <= 1.25 * theirs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_embeddings_are_scaled_as_transformers_rounds_the_factor(dtype: torch.dtype) -> None:
    factor, input_ids = 1152**0.5, torch.arange(50)  # not exact in bfloat16
    theirs = Gemma3TextScaledWordEmbedding(50, 8, padding_idx=0, embed_scale=factor).to(dtype)
    ours = Embedding(50, 8, scale=factor).to(dtype)
    ours.weight.data.copy_(theirs.weight)
    assert torch.equal(ours(input_ids), theirs(input_ids))


@pytest.mark.parametrize("name", VARIANTS)
def test_documents_in_a_pack_equal_the_same_documents_alone(tmp_path: Path, name: str) -> None:
    save_peer(tmp_path, name)
    model = load_model(tmp_path, dtype=torch.float64)
    input_ids, cu_seqlens = documents(*LENGTHS)
    packed = model(torch.cat((input_ids, torch.tensor([5, 6, 7]))), cu_seqlens)  # with a tail of no document
    assert torch.isfinite(packed).all()
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        alone = model(input_ids[start:end], torch.tensor([0, end - start], dtype=torch.int32))
        torch.testing.assert_close(packed[start:end], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_activation_checkpointing_gives_the_same_gradients(tmp_path: Path, name: str) -> None:
    save_peer(tmp_path, name)
    gradients = []
    for enabled in (False, True):
        model = load_model(tmp_path, dtype=torch.float32)
        add_lora(model, LoraConfig(rank=4, dropout=0.2))
        for parameter in adapter_parameters(model).values():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
        model.set_activation_checkpointing(enabled)
        model(*documents(*LENGTHS)).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in adapter_parameters(model).items()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert any(gradient.abs().sum() > 0 for gradient in gradients[0].values())


def test_gradients_reach_every_parameter_and_only_documents_matter(tmp_path: Path) -> None:
    save_peer(tmp_path, "gemma2")
    model = load_model(tmp_path, dtype=torch.float64)
    input_ids, cu_seqlens = documents(9, 4)
    hidden = model(torch.cat((input_ids, torch.tensor([3]))), cu_seqlens)
    hidden[:9].square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.abs().sum() > 0] == []
    untouched = sorted(set(range(SIZES["vocab_size"])) - set(input_ids[:9].tolist()))
    assert gradients["model.embed_tokens.weight"][untouched].abs().sum() == 0  # nothing leaks between documents


def test_a_new_model_is_random_and_follows_the_global_seed() -> None:
    config = ModelConfig.from_dict({**SIZES, "model_type": "gemma2", "head_dim": 24})
    torch.manual_seed(3)
    first = CausalLM(config, dtype=torch.bfloat16)
    torch.manual_seed(3)
    second = CausalLM(config, dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.model.norm.weight.abs().sum() == 0  # Gemma stores the scale minus one
    assert 0.01 < first.model.layers[0].mlp.up_proj.weight.float().std() < 0.03


def test_padded_batches_are_refused() -> None:
    model = CausalLM(ModelConfig.from_dict({**SIZES, "model_type": "llama"}))
    with pytest.raises(ValueError, match=r"takes packs, not padded batches"):
        model(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 6], dtype=torch.int32))
