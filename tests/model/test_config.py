from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from forge_core.model.config import SUPPORTED_MODEL_TYPES, ModelConfig, RopeConfig
from forge_core.model.rotary import inverse_frequencies

SIZES = {
    "vocab_size": 100,
    "hidden_size": 1024,
    "intermediate_size": 128,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
}
LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
# As such models are published: the keys of transformers before version 5.
PUBLISHED: dict[str, dict[str, Any]] = {
    "smollm2": {"model_type": "llama", "rope_theta": 100000, "rope_scaling": None, "tie_word_embeddings": True},
    "llama-3.1": {"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": LLAMA3, "mlp_bias": False},
    "mistral-7b-v0.1": {"model_type": "mistral", "rope_theta": 10000.0, "sliding_window": 4096},
    "mistral-7b-v0.3": {"model_type": "mistral", "rope_theta": 1e6, "sliding_window": None, "head_dim": 64},
    "qwen2.5": {"model_type": "qwen2", "rope_theta": 1e6, "use_sliding_window": False, "sliding_window": 131072},
    "qwen2-window": {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 28},
    "qwen3": {"model_type": "qwen3", "rope_theta": 1000000, "head_dim": 128, "attention_bias": False},
    "gemma2": {"model_type": "gemma2", "query_pre_attn_scalar": 144, "attn_logit_softcapping": 50.0},
    "gemma3-1b": {"model_type": "gemma3_text", "rope_theta": 1000000, "rope_local_base_freq": 10000},
    "gemma3-4b": {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
    "gemma3-pattern": {"model_type": "gemma3_text", "sliding_window_pattern": 3},
    "olmo2": {"model_type": "olmo2", "rope_theta": 500000, "rope_scaling": None, "rms_norm_eps": 1e-6},
}


def parse(**keys: Any) -> ModelConfig:
    return ModelConfig.from_dict({**SIZES, **keys}, source="config.json")


@pytest.mark.parametrize("name", PUBLISHED)
def test_old_keys_mean_what_transformers_makes_of_them(name: str) -> None:
    old = {**SIZES, **PUBLISHED[name]}
    new = transformers.AutoConfig.for_model(**old).to_dict()
    assert "rope_parameters" in new and "rope_theta" not in new
    assert ModelConfig.from_dict(old) == ModelConfig.from_dict(new)


@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
def test_left_out_keys_have_the_defaults_of_transformers(model_type: str) -> None:
    complete = transformers.AutoConfig.for_model(model_type, **SIZES).to_dict()
    assert parse(model_type=model_type) == ModelConfig.from_dict(complete)


def test_gemma3_has_a_rotary_embedding_for_each_kind_of_layer() -> None:
    config = parse(model_type="gemma3_text", sliding_window=512)
    assert config.ropes == (RopeConfig(1e6), RopeConfig(1e4))
    assert [config.ropes[index].theta for index in config.layer_ropes[:6]] == [1e4] * 5 + [1e6]
    assert config.layer_windows[:7] == (512, 512, 512, 512, 512, None, 512)


@pytest.mark.parametrize("rope", [RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 8192), RopeConfig(1e6, "linear", 4.0)])
def test_frequencies_are_those_of_transformers(rope: RopeConfig) -> None:
    parameters = {key: value for key, value in dataclasses.asdict(rope).items() if key not in ("theta", "kind")}
    parameters |= {"rope_type": rope.kind, "rope_theta": rope.theta}
    config = transformers.LlamaConfig(head_dim=64, max_position_embeddings=131072, rope_parameters=parameters)
    expected, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[rope.kind](config)
    assert torch.equal(inverse_frequencies(rope, 64), expected)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "mamba"}, "'mamba' is not supported.*llama, mistral, qwen2, qwen3, gemma2, gemma3_text, olmo2"),
        ({"model_type": "gemma3", "text_config": {}}, "text_config"),
        ({"model_type": "llama", "rope_scaling": {"type": "yarn", "factor": 4}}, "'yarn' is not supported.*llama3"),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "linear"}}, "needs the key 'factor'"),
        ({"model_type": "llama", "hidden_act": "relu"}, "hidden_act = 'relu'.*silu"),
        ({"model_type": "llama", "hidden_size": "64"}, "'hidden_size': expected a positive integer, got '64'"),
        ({"model_type": "llama", "num_key_value_heads": 3}, "not a multiple of num_key_value_heads = 3"),
        ({"model_type": "llama", "head_dim": 7}, "head_dim = 7"),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "llama", "layer_types": ["sliding_attention"] * 30}, "layer_types.*full_attention"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"model_type": "qwen2", "use_sliding_window": "yes"}, "'use_sliding_window': expected true or false"),
        ({"model_type": "llama", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"model_type": "llama", "attention_dropout": 0.1}, "attention_dropout"),
    ],
)
def test_what_is_not_supported_is_an_error(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^config.json: .*{message}"):
        parse(**keys)


def test_missing_key_and_unreadable_files(tmp_path: Path) -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "num_hidden_layers"}
    with pytest.raises(ValueError, match="'num_hidden_layers': expected a positive integer, got nothing"):
        ModelConfig.from_dict({"model_type": "llama", **sizes})
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        ModelConfig.from_file(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"model_type": "llama",\n oops}')
    with pytest.raises(ValueError, match=r"config\.json:2: not valid JSON"):
        ModelConfig.from_file(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(["llama"]))
    with pytest.raises(ValueError, match="expected a JSON object, got list"):
        ModelConfig.from_file(tmp_path / "config.json")
