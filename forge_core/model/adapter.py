"""Adapters in PEFT's file format: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from forge_core import atomic

from .decoder import CausalLM
from .io import list_names
from .lora import ALL_LINEAR, AdapterWeights, LoraConfig, adaptable_linears, adapter_parameters, attach

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # how PEFT wraps a model
_KEY = re.compile(r"base_model\.model\.(.+)\.(?:(lora_[AB])\.weight|(lora_magnitude_vector))")
_MAGNITUDE = "lora_magnitude_vector"
_LORA_PLUS = "lora_plus_ratio"  # kept in the weight file's metadata: PEFT's configuration has no such key

# Keys of adapter_config.json that do not change what the adapter computes. Any other key must be unset.
_HARMLESS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "init_lora_weights", "bias", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying", "use_dora",
}  # fmt: skip
_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")  # the others change the base weights as well


def save_adapter(model: CausalLM, path: str | Path) -> None:
    """Write the adapters as PEFT reads them; float32, bit for bit.

    Each file is written atomically, the weights first. Merged adapters are written as they are.

    Args:
        model: a model with adapters.
        path: the directory; created when missing. Other files in it are left alone.

    Raises:
        ValueError: the model has no adapters.
    """
    config = model.lora_config
    if config is None:
        raise ValueError("model: it has no adapters to save; add_lora or load_adapter attaches them")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    parameters = adapter_parameters(model)
    # PEFT writes magnitudes without the ".weight" of their parameter.
    tensors = {
        f"{_PREFIX}{name}".replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector"): value
        for name, value in ((name, value.detach().cpu().contiguous()) for name, value in parameters.items())
    }
    with atomic.atomic_file(path / ADAPTER_WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", _LORA_PLUS: repr(config.lora_plus_ratio)})
    adapted = {name.rsplit(".", 2)[0] for name in parameters}
    content: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if model.source is None else str(model.source),
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.use_rslora,
        "target_modules": _short_names(model, adapted),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": config.use_dora,
    }
    atomic.write_text(path / ADAPTER_CONFIG, json.dumps(content, indent=2) + "\n")


def load_adapter(model: CausalLM, path: str | Path) -> None:
    """Attach the adapters of a PEFT directory and freeze the base, as `add_lora` does.

    Args:
        model: a model without adapters.
        path: the directory with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: the model has adapters already, the adapter belongs to another model, or it uses a feature that is
            not supported.
    """
    path = Path(path)
    content = _read_config(path / ADAPTER_CONFIG)
    tensors, metadata = _read_weights(path / ADAPTER_WEIGHTS)
    weights = _gather(path / ADAPTER_WEIGHTS, tensors, bool(content.get("use_dora")))
    linears = adaptable_linears(model)
    foreign = [name for name in weights if name not in linears]
    rank = content["r"]
    wrong = [
        f"{name} A {list(a.shape)}, B {list(b.shape)} (expected [{rank}, {linears[name].in_features}], "
        f"[{linears[name].out_features}, {rank}])"
        for name, (a, b, _) in weights.items()
        if name in linears
        and (list(a.shape), list(b.shape)) != ([rank, linears[name].in_features], [linears[name].out_features, rank])
    ]
    wrong += [
        f"{name} magnitude {list(m.shape)} (expected [{linears[name].out_features}])"
        for name, (_, _, m) in weights.items()
        if m is not None and name in linears and list(m.shape) != [linears[name].out_features]
    ]
    if foreign or wrong:
        lists = [f"modules it does not have: {list_names(foreign)}"] if foreign else []
        lists += [f"matrices of another shape: {list_names(wrong)}"] if wrong else []
        raise ValueError(
            f"{path}: the adapter was trained on {content.get('base_model_name_or_path')!r} and does not fit this "
            f"{model.config.model_type} model; " + "; ".join(lists)
        )
    config = LoraConfig(
        rank=rank,
        alpha=content["lora_alpha"],
        dropout=content.get("lora_dropout") or 0.0,
        target_modules=ALL_LINEAR if len(weights) == len(linears) else _short_names(model, set(weights)),
        use_rslora=bool(content.get("use_rslora")),
        lora_plus_ratio=float(metadata.get(_LORA_PLUS, LoraConfig.lora_plus_ratio)),
        use_dora=bool(content.get("use_dora")),
    )
    attach(model, config, weights)


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; a PEFT adapter directory holds an {ADAPTER_CONFIG}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{error.lineno}: not valid JSON: {error.msg}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(content).__name__}")
    if content.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type {content.get('peft_type')!r} is not supported; supported: 'LORA'")
    unsupported = {key: value for key, value in content.items() if key not in _HARMLESS and value}
    if content.get("bias", "none") != "none":
        unsupported["bias"] = content["bias"]
    if content.get("init_lora_weights", True) not in _INITIALISATIONS:
        unsupported["init_lora_weights"] = content["init_lora_weights"]
    if unsupported:
        raise ValueError(
            f"{file}: not supported: {', '.join(f'{key} = {value!r}' for key, value in unsupported.items())}; "
            "supported: LoRA, rsLoRA or DoRA with one rank and alpha for all modules"
        )
    for key in ("r", "lora_alpha"):
        if isinstance(content.get(key), bool) or not isinstance(content.get(key), int | float):
            raise ValueError(f"{file}: key {key!r}: expected a number, got {content.get(key)!r}")
    return content


def _read_weights(file: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    if not file.is_file():
        hint = "; convert adapter_model.bin to safetensors first" if file.with_suffix(".bin").is_file() else ""
        raise FileNotFoundError(f"{file}: no such file{hint}")
    try:
        with safe_open(file, framework="pt") as weights:
            return {name: weights.get_tensor(name) for name in weights.keys()}, weights.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file}: not a readable safetensors file: {error}") from error


def _gather(file: Path, tensors: Mapping[str, Tensor], use_dora: bool) -> dict[str, AdapterWeights]:
    """Module path -> its adapter, float32."""
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    unknown = []
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(name)
        part = "" if match is None else match[2] or match[3]
        if match is None or tensor.dim() != (1 if part == _MAGNITUDE else 2) or (part == _MAGNITUDE and not use_dora):
            unknown.append(name)
        else:
            parts[match[1]][part] = tensor.to(torch.float32)
    halves = [name for name, found in parts.items() if len(found.keys() & {"lora_A", "lora_B"}) != 2]
    without = [name for name, found in parts.items() if use_dora and _MAGNITUDE not in found]
    if unknown or halves or without or not parts:
        lists = [f"tensors that are no lora_A or lora_B matrix: {list_names(unknown)}"] if unknown else []
        lists += [f"modules with only one of lora_A and lora_B: {list_names(halves)}"] if halves else []
        lists += [f"modules without {_MAGNITUDE}, with use_dora: {list_names(without)}"] if without else []
        raise ValueError(f"{file}: " + ("; ".join(lists) or "holds no adapter"))
    return {name: AdapterWeights(p["lora_A"], p["lora_B"], p.get(_MAGNITUDE)) for name, p in parts.items()}


def _short_names(model: CausalLM, adapted: set[str]) -> list[str]:
    """Names for `target_modules`: the last part of the path where every module of that name is adapted."""
    by_leaf: dict[str, set[str]] = defaultdict(set)
    for name in adaptable_linears(model):
        by_leaf[name.rsplit(".", 1)[1]].add(name)
    names: list[str] = []
    for leaf, all_paths in by_leaf.items():
        names += [leaf] if all_paths <= adapted else sorted(all_paths & adapted)
    return names
