"""The decoder's configuration, parsed from a Hugging Face `config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

RopeKind = Literal["default", "linear", "llama3"]
Activation = Literal["silu", "gelu_tanh"]
FULL, SLIDING = "full_attention", "sliding_attention"
_ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "llama3")
_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class RopeConfig:
    """Frequencies of the rotary embedding: base `theta` and how they are stretched (`kind`).

    "linear" divides every frequency by `factor`; "llama3" divides only wavelengths above
    `original_max_position_embeddings / low_freq_factor` and blends up to `/ high_freq_factor` (Llama 3.1).
    """

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True)
class NormNames:
    """Parameter names of a layer's norms; None where the architecture has no norm at that place."""

    pre_attention: str | None
    post_attention: str | None
    pre_mlp: str | None
    post_mlp: str | None


@dataclass(frozen=True)
class ModelConfig:
    """Everything the decoder depends on, independent of how the architecture spells it in `config.json`.

    `layer_windows[i]` is layer i's attention window (None: global), `ropes[layer_ropes[i]]` its rotary
    embedding. `raw` is the dictionary the configuration was read from, kept for saving.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    activation: Activation
    rms_norm_eps: float
    norm_weight_offset: float
    norms: NormNames
    qk_norm: Literal["none", "head", "projection"]
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    layer_windows: tuple[int | None, ...]
    layer_ropes: tuple[int, ...]
    ropes: tuple[RopeConfig, ...]
    attention_scale: float
    attention_softcap: float | None
    logit_softcap: float | None
    embedding_scale: float | None
    tie_word_embeddings: bool
    max_position_embeddings: int
    initializer_range: float
    raw: Mapping[str, Any] = field(repr=False, compare=False)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, source: str = "config") -> ModelConfig:
        """Parse the dictionary of a `config.json`; `source` names it in error messages.

        Raises:
            ValueError: unknown architecture, missing key, or a feature the decoder does not have.
        """
        return _Parser(raw, source).parse()

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """Parse `config.json`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a JSON object, or as in `from_dict`.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; a Hugging Face model directory holds a config.json")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
        if not isinstance(raw, dict):
            raise ValueError(f"{path}: expected a JSON object, got {type(raw).__name__}")
        return cls.from_dict(raw, source=str(path))


@dataclass(frozen=True)
class _Architecture:
    """What a `model_type` fixes, and the defaults of keys its `config.json` may leave out."""

    norms: NormNames
    defaults: Mapping[str, Any]
    qk_norm: Literal["none", "head", "projection"] = "none"
    qkv_bias: bool | None = None  # None: the key attention_bias decides, for q, k, v and o alike
    o_bias: bool | None = None
    windows: Literal["none", "all", "from_layer", "alternating"] = "none"
    gemma: bool = False  # norms scale by 1 + weight, embeddings by sqrt(hidden_size)


_PRE = NormNames("input_layernorm", None, "post_attention_layernorm", None)
_POST = NormNames(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
_BOTH = NormNames(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)
_QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA = {
    "head_dim": 256,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
}
_GEMMA2 = {
    **_GEMMA,
    "max_position_embeddings": 8192,
    "sliding_window_pattern": 2,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA3 = {
    **_GEMMA,
    "max_position_embeddings": 131072,
    "sliding_window_pattern": 6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}

# The defaults are those of the architectures' configuration classes in transformers: a config.json may rely on them.
_ARCHITECTURES: dict[str, _Architecture] = {
    "llama": _Architecture(_PRE, {"max_position_embeddings": 2048}),
    "mistral": _Architecture(
        _PRE,
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        qkv_bias=False,
        o_bias=False,
        windows="all",
    ),
    "qwen2": _Architecture(
        _PRE,
        _QWEN,
        qkv_bias=True,
        o_bias=False,
        windows="from_layer",
    ),
    "qwen3": _Architecture(
        _PRE,
        {**_QWEN, "head_dim": 128},
        qk_norm="head",
        windows="from_layer",
    ),
    "gemma2": _Architecture(_BOTH, _GEMMA2, windows="alternating", gemma=True),
    "gemma3_text": _Architecture(_BOTH, _GEMMA3, qk_norm="head", windows="alternating", gemma=True),
    "olmo2": _Architecture(_POST, {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048}, qk_norm="projection"),
}

SUPPORTED_MODEL_TYPES = tuple(_ARCHITECTURES)


class _Parser:
    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self.raw, self.source = raw, source
        model_type = raw.get("model_type")
        if model_type not in _ARCHITECTURES:
            hint = "; take its text model (text_config) out first" if "text_config" in raw else ""
            raise ValueError(
                f"{source}: model_type {model_type!r} is not supported{hint}; "
                f"supported: {', '.join(SUPPORTED_MODEL_TYPES)}"
            )
        self.model_type: str = model_type
        self.architecture = _ARCHITECTURES[model_type]

    def get(self, key: str, default: Any = None) -> Any:
        if key in self.raw:
            return self.raw[key]
        return self.architecture.defaults.get(key, default)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if value is None and default is not None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            got = "nothing" if key not in self.raw else repr(value)
            raise ValueError(f"{self.source}: key {key!r}: expected a positive integer, got {got}")
        return value

    def number(self, key: str, default: float | None = None) -> float | None:
        value = self.get(key, default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{self.source}: key {key!r}: expected a number, got {value!r}")
        return None if value is None else float(value)

    def positive(self, key: str, default: float) -> float:
        value = self.number(key, default)
        if value is None or not value > 0:
            raise ValueError(f"{self.source}: key {key!r}: expected a positive number, got {value!r}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.source}: key {key!r}: expected true or false, got {value!r}")
        return value

    def unsupported(self, key: str, supported: str) -> ValueError:
        return ValueError(
            f"{self.source}: {key} = {self.raw.get(key)!r} is not supported for {self.model_type}; "
            f"supported: {supported}"
        )

    def parse(self) -> ModelConfig:
        self.check_features()
        architecture = self.architecture
        heads, hidden = self.integer("num_attention_heads"), self.integer("hidden_size")
        kv_heads = self.integer("num_key_value_heads", heads)
        head_dim = self.integer("head_dim", max(hidden // heads, 1))
        if heads % kv_heads:
            raise ValueError(
                f"{self.source}: num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}"
            )
        if head_dim % 2:
            raise ValueError(f"{self.source}: head_dim = {head_dim}: rotary embeddings need an even head_dim")
        layers = self.integer("num_hidden_layers")
        layer_types = self.layer_types(layers)
        ropes = self.ropes(sorted(set(layer_types)))
        distinct = tuple(dict.fromkeys(ropes.values()))
        window = self.window() if SLIDING in layer_types else None
        bias = self.flag("attention_bias", False)
        gemma = architecture.gemma
        return ModelConfig(
            model_type=self.model_type,
            vocab_size=self.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=self.integer("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            activation=self.activation(),
            rms_norm_eps=self.positive("rms_norm_eps", 1e-6),
            norm_weight_offset=1.0 if gemma else 0.0,
            norms=architecture.norms,
            qk_norm=architecture.qk_norm,
            qkv_bias=bias if architecture.qkv_bias is None else architecture.qkv_bias,
            o_bias=bias if architecture.o_bias is None else architecture.o_bias,
            mlp_bias=self.flag("mlp_bias", False) if self.model_type == "llama" else False,
            layer_windows=tuple(window if kind == SLIDING else None for kind in layer_types),
            layer_ropes=tuple(distinct.index(ropes[kind]) for kind in layer_types),
            ropes=distinct,
            attention_scale=(self.positive("query_pre_attn_scalar", 256) if gemma else head_dim) ** -0.5,
            attention_softcap=self.number("attn_logit_softcapping") if self.model_type == "gemma2" else None,
            logit_softcap=self.number("final_logit_softcapping") if gemma else None,
            embedding_scale=hidden**0.5 if gemma else None,
            tie_word_embeddings=self.flag("tie_word_embeddings", False),
            max_position_embeddings=self.integer("max_position_embeddings"),
            initializer_range=self.positive("initializer_range", 0.02),
            raw=dict(self.raw),
        )

    def check_features(self) -> None:
        quantization = self.raw.get("quantization_config")
        if quantization is not None and not (isinstance(quantization, Mapping) and quantization.get("load_in_4bit")):
            raise self.unsupported("quantization_config", "none, or 4 bits of bitsandbytes (load_in_4bit)")
        if self.raw.get("use_bidirectional_attention"):
            raise self.unsupported("use_bidirectional_attention", "false (causal attention)")
        if self.raw.get("attention_dropout"):
            raise self.unsupported("attention_dropout", "0.0")
        if self.raw.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise self.unsupported("partial_rotary_factor", "1.0 (the whole head is rotated)")
        if self.model_type == "gemma3_text" and self.raw.get("attn_logit_softcapping") is not None:
            raise self.unsupported("attn_logit_softcapping", "null (this architecture normalises queries and keys)")

    def activation(self) -> Activation:
        key = "hidden_activation" if self.architecture.gemma else "hidden_act"
        name = self.get(key, "silu")
        if name is None:
            name = self.architecture.defaults.get(key, "silu")
        if name not in _ACTIVATIONS:
            raise self.unsupported(key, ", ".join(_ACTIVATIONS))
        return _ACTIVATIONS[name]

    def window(self) -> int:
        if self.get("sliding_window") is None:
            raise ValueError(f"{self.source}: layers with {SLIDING} need the key 'sliding_window'")
        return self.integer("sliding_window")

    def layer_types(self, layers: int) -> list[str]:
        """Kind of attention of each layer: given, or by the architecture's rule."""
        rule = self.architecture.windows
        given = self.raw.get("layer_types")
        windowed = rule in ("all", "alternating") or (rule == "from_layer" and self.flag("use_sliding_window", False))
        windowed = windowed and self.get("sliding_window") is not None
        if given is not None:
            supported = {FULL, SLIDING} if windowed else {FULL}
            if not isinstance(given, list) or len(given) != layers or not supported.issuperset(given):
                raise self.unsupported("layer_types", f"a list of {layers} of {', '.join(sorted(supported))}")
            if rule == "all" and set(given) != {SLIDING}:
                raise self.unsupported("layer_types", f"{SLIDING} in every layer, or no such key")
            return given
        if not windowed:
            return [FULL] * layers
        if rule == "all":
            return [SLIDING] * layers
        if rule == "from_layer":
            first = self.get("max_window_layers")
            return [SLIDING if i >= first else FULL for i in range(layers)]
        pattern = self.integer("sliding_window_pattern")
        return [SLIDING if (i + 1) % pattern else FULL for i in range(layers)]

    def ropes(self, layer_types: list[str]) -> dict[str, RopeConfig]:
        """Rotary embedding of each layer type, from `rope_parameters` or from `rope_theta` and `rope_scaling`."""
        parameters = self.raw.get("rope_parameters")
        if parameters is None:
            parameters = self.raw.get("rope_scaling") or {}
            if self.model_type == "gemma3_text":
                parameters = {FULL: parameters, SLIDING: {}}
        if not isinstance(parameters, dict):
            raise ValueError(f"{self.source}: rope_parameters: expected an object, got {parameters!r}")
        nested = any(key in (FULL, SLIDING) for key in parameters)
        found = {}
        for kind in layer_types:
            theta_key = "rope_theta"
            if nested and kind == SLIDING and self.model_type == "gemma3_text":
                theta_key = "rope_local_base_freq"
            found[kind] = self.rope((parameters.get(kind) or {}) if nested else parameters, theta_key)
        return found

    def rope(self, parameters: Mapping[str, Any], theta_key: str) -> RopeConfig:
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind not in _ROPE_KINDS:
            raise ValueError(f"{self.source}: rope_type {kind!r} is not supported; supported: {', '.join(_ROPE_KINDS)}")
        if parameters.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise ValueError(f"{self.source}: partial_rotary_factor is not supported; the whole head is rotated")
        theta = parameters.get("rope_theta")
        values: dict[str, float] = {"theta": self.positive(theta_key, 1e4) if theta is None else theta}
        needed = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
        for key in needed[kind]:
            if key not in parameters:
                raise ValueError(f"{self.source}: rope_type {kind!r} needs the key {key!r}")
            values[key] = parameters[key]
        for key, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{self.source}: rope parameter {key}: expected a positive number, got {value!r}")
        original = 0
        if kind == "llama3":
            original = parameters.get("original_max_position_embeddings") or self.integer("max_position_embeddings")
        return RopeConfig(
            kind=kind, original_max_position_embeddings=int(original), **{k: float(v) for k, v in values.items()}
        )
