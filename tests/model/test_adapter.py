from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from forge_core.model import LoraConfig, adapter_parameters, add_lora, load_adapter, load_model, save_adapter

from .tiny import documents, relative_error, save_peer, transformers_logits

PACK = documents(13, 5)
TARGETS: list[Any] = ["all-linear", ["q_proj", "v_proj"], ["down_proj", "layers.1.self_attn.o_proj"]]


def fill(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)


VARIANTS: list[dict[str, bool]] = [{}, {"use_rslora": True}, {"use_dora": True}]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
def test_adapters_written_here_act_the_same_in_peft(
    tmp_path: Path, name: str, targets: Any, variant: dict[str, bool]
) -> None:
    peer = save_peer(tmp_path / "base", name)
    model = load_model(tmp_path / "base", dtype=torch.float32)
    add_lora(model, LoraConfig(rank=4, alpha=6, dropout=0.1, target_modules=targets, **variant))
    fill(adapter_parameters(model).values())
    save_adapter(model, tmp_path / "adapter")
    wrapped = peft.PeftModel.from_pretrained(peer, tmp_path / "adapter").eval()
    theirs = {key: value for key, value in wrapped.state_dict().items() if ".lora_" in key}
    assert len(theirs) == len(adapter_parameters(model))
    for key, value in adapter_parameters(model).items():
        assert torch.equal(theirs["base_model.model." + key.replace(".weight", ".default.weight")], value), key
    model.eval()
    expected = transformers_logits(wrapped, *PACK)
    assert relative_error(model.logits(model(*PACK)), expected) < 1e-5
    with model.adapters_disabled(), wrapped.disable_adapter():
        base = transformers_logits(wrapped, *PACK)
        assert relative_error(model.logits(model(*PACK)), base) < 1e-5
    assert relative_error(base, expected) > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("targets", TARGETS)
def test_adapters_written_by_peft_act_the_same_here(tmp_path: Path, targets: Any, variant: dict[str, bool]) -> None:
    peer = save_peer(tmp_path / "base", "llama3-rope")
    settings: dict[str, Any] = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.1, "target_modules": targets, **variant}
    wrapped = peft.get_peft_model(peer, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    fill(value for key, value in wrapped.named_parameters() if "lora_" in key)
    wrapped.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "base", dtype=torch.float32).eval()
    load_adapter(model, tmp_path / "theirs")
    assert model.lora_config is not None
    assert (model.lora_config.rank, model.lora_config.alpha, model.lora_config.dropout) == (3, 5, 0.1)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(adapter_parameters(model))
    assert relative_error(model.logits(model(*PACK)), transformers_logits(wrapped, *PACK)) < 1e-5
    save_adapter(model, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in theirs)
    settings = {side: json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("theirs", "ours")}
    for key in settings["ours"].keys() - {"base_model_name_or_path", "target_modules", "task_type"}:
        assert settings["ours"][key] == settings["theirs"][key], key


@pytest.mark.parametrize("targets", TARGETS)
def test_everything_survives_our_own_round_trip(tmp_path: Path, targets: Any) -> None:
    save_peer(tmp_path / "base", "llama")
    first, second = (load_model(tmp_path / "base") for _ in range(2))
    config = LoraConfig(rank=2, alpha=0.5, target_modules=targets, lora_plus_ratio=4.5)
    add_lora(first, config)
    fill(adapter_parameters(first).values())
    save_adapter(first, tmp_path / "adapter")
    load_adapter(second, tmp_path / "adapter")
    assert first(*PACK).equal(second(*PACK))
    assert second.lora_config is not None and second.lora_config.lora_plus_ratio == 4.5
    assert second.lora_config.alpha == 0.5
    assert (second.lora_config.target_modules == "all-linear") == (targets == "all-linear")
    assert adapter_parameters(first).keys() == adapter_parameters(second).keys()


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "modules without lora_magnitude_vector"),
        ({"lora_bias": True}, "not supported: lora_bias = True"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"a_key_of_the_future": {"x": 1}}, "a_key_of_the_future"),
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        ({"r": None}, "'r': expected a number, got None"),
        ({"r": 8}, r"matrices of another shape: .*q_proj A \[2, 64\]"),
    ],
)
def test_adapters_that_cannot_be_honoured_are_errors(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_peer(tmp_path / "base", "llama")
    model = load_model(tmp_path / "base")
    add_lora(model, LoraConfig(rank=2))
    save_adapter(model, tmp_path / "adapter")
    edit(tmp_path / "adapter", **changes)
    fresh = load_model(tmp_path / "base")
    with pytest.raises(ValueError, match=message):
        load_adapter(fresh, tmp_path / "adapter")
    assert fresh.lora_config is None


def test_adapter_of_another_model_and_broken_files(tmp_path: Path) -> None:
    save_peer(tmp_path / "base", "llama")
    save_peer(tmp_path / "smaller", "llama", num_hidden_layers=3, intermediate_size=48)
    model, other = load_model(tmp_path / "base"), load_model(tmp_path / "smaller")
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapter(model, tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json: no such file"):
        load_adapter(other, tmp_path / "adapter")
    add_lora(model, LoraConfig(rank=2))
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="does not fit this llama model") as caught:
        load_adapter(other, tmp_path / "adapter")
    assert "modules it does not have: model.layers.3.mlp.down_proj" in str(caught.value)
    assert "model.layers.0.mlp.up_proj A [2, 64], B [80, 2] (expected [2, 64], [48, 2])" in str(caught.value)
    with pytest.raises(ValueError, match="has adapters already"):
        load_adapter(model, tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors.pop("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight")
    tensors["base_model.model.lm_head.weight"] = torch.zeros(2, 2)
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=r"no lora_A or lora_B matrix: base_model.model.lm_head.weight; .*up_proj"):
        load_adapter(load_model(tmp_path / "base"), tmp_path / "adapter")
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(FileNotFoundError, match=r"convert adapter_model.bin"):
        load_adapter(load_model(tmp_path / "base"), tmp_path / "adapter")
