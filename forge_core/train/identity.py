"""What makes a run this run: its order, data and architecture, so that a resume that would diverge is refused."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forge_core.model import ModelConfig
from forge_core.recipe import Recipe

from .sources import Source

_SAMPLES, _SAMPLE_BYTES = 64, 4096  # of each weight file; enough to tell two checkpoints apart without reading them


class ResumeError(ValueError):
    """A checkpoint that does not belong to this run; the message names what differs."""


def run_identity(recipe: Recipe, sources: list[Source]) -> dict[str, Any]:
    """Return what determines every step, in four parts, as plain JSON values.

    order: what decides which sample comes when. data: content of each source. architecture: the model's configuration,
    base weights, adapters and dtype. optimization: learning rates and the like, which may be changed when resuming.

    Raises:
        FileNotFoundError, ValueError: the base model's config.json or weights cannot be read.
    """
    determining = recipe.determining()
    training = determining["training"]
    lora = determining["lora"]
    config = dataclasses.asdict(ModelConfig.from_file(recipe.model.path / "config.json"))
    del config["raw"]
    identity = {
        "order": {
            "seed": recipe.seed,
            "packs_per_step": training.pop("packs_per_step"),
            "max_length": recipe.data.max_length,
            "share_of": recipe.data.share_of,
            "sources": [source.name for source in sources],
            "shares": [round(source.share, 12) for source in sources],
        },
        "data": {source.name: source.store.key for source in sources},
        "architecture": {
            **config,
            "dtype": recipe.model.dtype,
            **({"quantize": determining["quantize"]} if "quantize" in determining else {}),
            "base_weights": weights_fingerprint(recipe.model.path),
            # Without DoRA as before there was any: runs that were begun then can be resumed.
            "lora": None
            if lora is None
            else {k: v for k, v in lora.items() if k != "lora_plus_ratio" and (k, v) != ("use_dora", False)},
        },
        "optimization": {**training, "lora_plus_ratio": None if lora is None else lora["lora_plus_ratio"]},
    }
    plain: dict[str, Any] = json.loads(json.dumps(identity))
    return plain


def weights_fingerprint(folder: str | os.PathLike[str]) -> str:
    """Hash names, sizes and evenly spaced samples of a folder's safetensors files; SHA-256, hexadecimal."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for number in range(_SAMPLES):
                stream.seek(number * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def compare(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Refuse a resume that would diverge; return in words what may differ and does.

    Raises:
        ResumeError: order, data or architecture differ.
    """
    reasons = [
        f"{part} differs: {line}"
        for part in ("order", "data", "architecture")
        for line in _differences(saved[part], current[part])
    ]
    if reasons:
        raise ResumeError(
            "cannot resume, the run would diverge from the one that was begun:\n  "
            + "\n  ".join(reasons)
            + "\nrestore these, or start a new run in another output_dir"
        )
    return _differences(saved["optimization"], current["optimization"])


def _differences(saved: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for key in dict.fromkeys([*saved, *current]):
        old, new = saved.get(key), current.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key} was {_short(old)}, is {_short(new)}")
    return lines


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
