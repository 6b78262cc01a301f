"""Tiny random models of every supported architecture, as transformers builds and saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

transformers.utils.logging.disable_progress_bar()

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA = {"head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": 7}

# name -> (model_type, configuration beyond SIZES)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("mistral", {"sliding_window": 9, "head_dim": 24}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 0.5}),
    "gemma3": (
        "gemma3_text",
        {
            **GEMMA,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
            },
        },
    ),
    "olmo2": ("olmo2", {}),
}


def peer(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A transformers model with weights large enough that every part of the architecture shows in the logits."""
    model_type, extra = VARIANTS[name]
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **extra, **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.normal_(0.0, 0.15)
        if name.startswith("gemma"):  # scaled by sqrt(hidden) and tied: larger ones would only repeat the last token
            model.get_input_embeddings().weight.mul_(0.2)
    return model.eval()


def save_peer(path: Path, name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Save such a model as a Hugging Face directory and return it."""
    model = peer(name, dtype, **changes)
    model.save_pretrained(path)
    return model


def documents(*lengths: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """A pack of random documents: input_ids int64 [tokens] and cu_seqlens int32 [documents + 1]."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(SIZES["vocab_size"], (sum(lengths),), generator=generator)
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return input_ids, cu_seqlens


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of the expected values."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def transformers_logits(model: Any, input_ids: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Logits of each document of a pack, run alone through transformers, one after the other."""
    spans = zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)
    with torch.no_grad():
        return torch.cat([model(input_ids[start:end][None]).logits[0] for start, end in spans if end > start])
