"""One LoRA step of models with the shapes of Llama-3-8B and Qwen2.5-7B, random weights, against transformers + PEFT.

Packs of log-normal documents up to 4096 tokens, half of the tokens with loss, no activation checkpointing.
"""

import importlib.util
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from bench import flops
from bench.ops.packed_attention import Pack
from bench.registry import Candidates, Thunk, peer, suite_device, workload
from forge_core.kernels import PackPlan, weighted_linear_cross_entropy
from forge_core.model import CausalLM, LoraConfig, ModelConfig, adapter_parameters, add_lora
from forge_core.train.optimizer import MasterAdamW

RANK, ALPHA, LEARNING_RATE, TOKENS = 16, 32, 1e-5, 8192
_COMMON = {"hidden_act": "silu", "tie_word_embeddings": False, "initializer_range": 0.02}
MODELS: dict[str, dict[str, Any]] = {
    "Llama-3-8B": _COMMON
    | {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    },
    "Qwen2.5-7B": _COMMON
    | {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 152064, "hidden_size": 3584,
        "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    },
}  # fmt: skip


def forge(raw: dict[str, Any], pack: Pack, device: str) -> Thunk:
    """The step as forge_core's trainer makes it."""
    bounds = np.array([0, *np.cumsum(pack.lengths())], np.int32)
    input_ids, targets, weights = _inputs(raw["vocab_size"], pack, device)
    cu_seqlens = torch.tensor(bounds, device=device)

    @cache
    def built() -> tuple[CausalLM, MasterAdamW, int]:
        model = CausalLM(ModelConfig.from_dict(raw), dtype=torch.bfloat16, device=device)
        add_lora(model, LoraConfig(rank=RANK, alpha=ALPHA))
        return model.train(), MasterAdamW(adapter_parameters(model)), int((weights != 0).sum())

    def step() -> None:
        model, optimizer, counted_rows = built()
        hidden = model(input_ids, cu_seqlens, plan=PackPlan(bounds))
        loss = weighted_linear_cross_entropy(
            hidden, model.lm_head_weight, targets, weights, counted_rows=counted_rows
        ).loss
        loss.backward()
        optimizer.step(LEARNING_RATE)

    return step


def transformers_peft(raw: dict[str, Any], pack: Pack, device: str) -> Thunk:
    """transformers + PEFT on the pack as one row: FlashAttention 2 where it is installed, else SDPA and a mask."""
    import peft
    import transformers

    input_ids, targets, _ = _inputs(raw["vocab_size"], pack, device)
    labels = targets.roll(1)
    bounds = np.cumsum([0, *pack.lengths()]).tolist()
    labels[bounds[:-1]] = -100
    positions = torch.cat([torch.arange(b - a, device=device) for a, b in pairwise(bounds)])
    attention = "flash_attention_2" if importlib.util.find_spec("flash_attn") else "sdpa"

    @cache
    def built() -> tuple[Any, Callable[[], None]]:
        config = transformers.AutoConfig.for_model(**raw)
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation=attention
            )
        model.config.use_cache = False
        adapters = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, adapters).train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

        def update() -> None:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return model, update

    def step() -> None:
        model, update = built()
        model(input_ids=input_ids[None], labels=labels[None], position_ids=positions[None]).loss.backward()
        update()

    return step


def _inputs(vocab: int, pack: Pack, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, targets (half of them ignored, none beyond a document's end) and weights."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(vocab, (pack.tokens,), generator=generator)
    targets = input_ids.roll(-1)
    targets[torch.rand(pack.tokens, generator=generator) < 0.5] = -100
    targets[np.cumsum(pack.lengths()) - 1] = -100
    weights = (targets != -100).float()
    return input_ids.to(device), targets.to(device), weights.to(device)


def _register(name: str, raw: dict[str, Any]) -> None:
    pack = Pack(TOKENS, 0, 0, 0, mean=600, longest=4096)
    lengths, config = pack.lengths(), ModelConfig.from_dict(raw)

    @workload(
        "sft_step",
        f"{name} shapes, LoRA r{RANK}, {TOKENS} tokens, {len(lengths)} documents up to {max(lengths)}",
        suite="gpu",
        flops=flops.lora_step(config, lengths, TOKENS, RANK),
        tokens=TOKENS,
        note=f"{flops.LORA_STEP} N includes the head for every token, though half of them have no loss.",
        headline=True,
    )
    def build() -> Candidates:
        device = suite_device("gpu")
        return {
            "forge": forge(raw, pack, device),
            "transformers + PEFT packed": peer("peft", lambda: transformers_peft(raw, pack, device)),
        }


for name, raw in MODELS.items():
    _register(name, raw)
