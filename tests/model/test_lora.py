from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from forge_core.model import (
    CausalLM,
    LoraConfig,
    ModelConfig,
    adapter_parameters,
    add_lora,
    merge_lora,
    remove_lora,
    unmerge_lora,
)

from .tiny import SIZES, documents, relative_error

PACK = documents(11, 0, 6)


def tiny_model(dtype: torch.dtype = torch.float32, **changes: Any) -> CausalLM:
    torch.manual_seed(0)
    config = ModelConfig.from_dict({**SIZES, "model_type": "qwen2", "num_hidden_layers": 2, **changes})
    model = CausalLM(config, dtype=dtype)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def with_adapters(config: LoraConfig, dtype: torch.dtype = torch.float32, **changes: Any) -> CausalLM:
    """A model whose adapters change its output."""
    model = tiny_model(dtype, **changes)
    add_lora(model, config)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def test_new_adapters_are_float32_on_a_frozen_base_and_change_nothing() -> None:
    model = tiny_model(torch.bfloat16)
    before = model(*PACK)
    add_lora(model, LoraConfig(rank=4), seed=7)
    assert torch.equal(before, model(*PACK))
    parameters = adapter_parameters(model)
    assert [name.split(".", 3)[3] for name in list(parameters)[:4]] == [
        "self_attn.q_proj.lora_A.weight",
        "self_attn.q_proj.lora_B.weight",
        "self_attn.k_proj.lora_A.weight",
        "self_attn.k_proj.lora_B.weight",
    ]
    assert len(parameters) == 2 * 7 * 2 and {p.dtype for p in parameters.values()} == {torch.float32}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == set(parameters)
    down = parameters["model.layers.0.mlp.down_proj.lora_A.weight"]
    assert 0.9 < down.abs().max() * math.sqrt(SIZES["intermediate_size"]) <= 1.0
    assert all((value == 0).all() for name, value in parameters.items() if "lora_B" in name)


def test_the_seed_decides_the_start() -> None:
    models = [tiny_model() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        add_lora(model, LoraConfig(rank=2), seed=seed)
    first, same, other = (adapter_parameters(model)["model.layers.1.mlp.up_proj.lora_A.weight"] for model in models)
    assert torch.equal(first, same) and not torch.equal(first, other)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["layers.1.mlp.up_proj", "k_proj"]])
def test_adapters_add_the_scaled_product(targets: Any, use_rslora: bool) -> None:
    config = LoraConfig(rank=4, alpha=6, target_modules=targets, use_rslora=use_rslora)
    model = with_adapters(config, torch.float64)
    assert config.scaling == (3.0 if use_rslora else 1.5)
    expected = tiny_model(torch.float64)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if name.endswith("lora_A.weight"):
                path = name.removesuffix(".lora_A.weight")
                lora_b = model.get_submodule(path).lora_B.weight
                expected.get_submodule(path).weight += config.scaling * (lora_b.double() @ parameter.double())
    assert relative_error(model(*PACK), tiny_model(torch.float64)(*PACK)) > 1e-3
    assert relative_error(model(*PACK), expected(*PACK)) < 1e-12


def test_gradients_reach_the_adapters_only() -> None:
    model = with_adapters(LoraConfig(rank=4, target_modules=["q_proj", "gate_proj", "up_proj", "o_proj"]))
    F.cross_entropy(model.logits(model(*PACK)), torch.arange(17)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter_parameters(model).values())
    assert all(p.grad is None for name, p in model.named_parameters() if "lora" not in name)


def test_dropout_acts_in_training_only_and_is_repeatable() -> None:
    model = with_adapters(LoraConfig(rank=4, dropout=0.5))
    first, second = model(*PACK), model(*PACK)
    assert not torch.equal(first, second)
    model.dropout_seed = 0
    assert torch.equal(first, model(*PACK))
    model.eval()
    calm = model(*PACK)
    assert torch.equal(calm, model(*PACK)) and not torch.equal(calm, first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_computes_the_same_and_unmerge_restores_the_bits(dtype: torch.dtype) -> None:
    model = with_adapters(LoraConfig(rank=4, target_modules=["k_proj", "down_proj"]), dtype)
    adapted = model(*PACK)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merge_lora(model)
    assert not torch.equal(before["model.layers.0.mlp.down_proj.weight"], model.model.layers[0].mlp.down_proj.weight)
    assert relative_error(model(*PACK), adapted) < (1e-6 if dtype == torch.float32 else 2e-2)
    merge_lora(model)  # a second time changes nothing
    assert relative_error(model(*PACK), adapted) < (1e-6 if dtype == torch.float32 else 2e-2)
    unmerge_lora(model)
    unmerge_lora(model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert torch.equal(model(*PACK), adapted)


@pytest.mark.parametrize("merged", [False, True])
def test_adapters_disabled_is_the_base_model_bit_for_bit(merged: bool) -> None:
    model = with_adapters(LoraConfig(rank=4), torch.bfloat16)
    base = tiny_model(torch.bfloat16)(*PACK)
    if merged:
        merge_lora(model)
    adapted = model(*PACK)
    with model.adapters_disabled():
        assert torch.equal(model(*PACK), base)
        with model.adapters_disabled():
            assert torch.equal(model(*PACK), base)
        assert torch.equal(model(*PACK), base)
    assert torch.equal(model(*PACK), adapted) and not torch.equal(adapted, base)
    with pytest.raises(RuntimeError, match="stop"), model.adapters_disabled():
        raise RuntimeError("stop")
    assert torch.equal(model(*PACK), adapted)
    remove_lora(model)
    assert torch.equal(model(*PACK), base) and not adapter_parameters(model)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rank": 0}, "rank: expected an integer >= 1, got 0"),
        ({"alpha": -1}, "alpha: expected a positive number"),
        ({"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\)"),
        ({"lora_plus_ratio": 0}, "lora_plus_ratio"),
        ({"target_modules": "linear"}, "target_modules: expected 'all-linear' or a list of names, got 'linear'"),
        ({"target_modules": []}, "target_modules: got an empty list"),
    ],
)
def test_bad_settings_are_errors(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraConfig(**keys)


def test_settings_that_do_not_fit_the_model_are_errors() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"rank: 33 exceeds .* model.layers.0.self_attn.k_proj \[32, 64\]"):
        add_lora(model, LoraConfig(rank=33))
    with pytest.raises(ValueError, match=r"no layer of this qwen2 model is called qkv, lm_head; .*q_proj, k_proj"):
        add_lora(model, LoraConfig(rank=2, target_modules=["q_proj", "qkv", "lm_head"]))
    assert all(parameter.requires_grad for parameter in model.parameters())  # a refused adapter freezes nothing
    with pytest.raises(ValueError, match="no adapters to merge"):
        merge_lora(model)
    add_lora(model, LoraConfig(rank=2))
    with pytest.raises(ValueError, match="has adapters already; remove_lora"):
        add_lora(model, LoraConfig(rank=2))
