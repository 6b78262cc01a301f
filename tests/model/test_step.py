from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from forge_core.model import CausalLM, LoraConfig, adapter_parameters, add_lora, load_model, merge_lora
from forge_core.model.cache import KVCache
from forge_core.model.generate import _prefill
from forge_core.model.step import DecodeStep
from tests.tolerance import assert_as_accurate

from .tiny import VARIANTS, documents, save_peer

pytestmark = pytest.mark.skipif(
    not torch.ops.forge.has_bf16_dot_product(), reason="this CPU (or FORGE_CPU_ISA) has no bfloat16 dot product"
)
LENGTHS = (5, 23, 1, 40)


@torch.no_grad()
def hidden_after_three_steps(model: CausalLM, *, fused: bool) -> Tensor:
    """Hidden states of the last of three given tokens behind each prompt."""
    input_ids, cu_seqlens = documents(*LENGTHS)
    prompts = [input_ids[a:b].tolist() for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)]
    cache = KVCache(model.config, len(prompts), dtype=model.lm_head_weight.dtype, device=torch.device("cpu"))
    cache.reserve(max(LENGTHS) + 3)
    _prefill(model, cache, prompts, 0)
    step = DecodeStep(model, cache)
    assert (step.stack is not None) == (model.lm_head_weight.dtype == torch.bfloat16)
    if not fused:
        step.stack = None
    for i in range(3):
        hidden = step(torch.tensor([11, 29, 3, 50]) + i, torch.tensor(LENGTHS) + i)
    return hidden


def with_adapters(model: CausalLM) -> CausalLM:
    add_lora(model, LoraConfig(rank=6, alpha=8))
    for parameter in adapter_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_one_op_is_as_accurate_as_the_modules(tmp_path: Path, name: str, adapted: bool) -> None:
    save_peer(tmp_path, name, torch.bfloat16)
    prepare = with_adapters if adapted else lambda model: model
    exact = prepare(load_model(tmp_path, dtype=torch.float64))
    model = prepare(load_model(tmp_path, dtype=torch.bfloat16))
    fused, modules = (hidden_after_three_steps(model, fused=fused) for fused in (True, False))
    assert_as_accurate("hidden", fused, modules, hidden_after_three_steps(exact, fused=False))


def test_disabled_and_merged_adapters_do_not_act_twice(tmp_path: Path) -> None:
    save_peer(tmp_path, "qwen3", torch.bfloat16)
    base = load_model(tmp_path, dtype=torch.bfloat16)
    model = with_adapters(load_model(tmp_path, dtype=torch.bfloat16))
    with model.adapters_disabled():
        assert torch.equal(hidden_after_three_steps(model, fused=True), hidden_after_three_steps(base, fused=True))
    cache = KVCache(model.config, 1, dtype=torch.bfloat16, device=torch.device("cpu"))
    stack = DecodeStep(model, cache).stack
    assert stack is not None and stack.layers[0].q.lora_a is not None
    merge_lora(model)
    stack = DecodeStep(model, cache).stack
    assert stack is not None and stack.layers[0].q.lora_a is None


def test_sequences_finish_and_make_room_in_bfloat16(tmp_path: Path) -> None:
    save_peer(tmp_path, "llama", torch.bfloat16)
    model = load_model(tmp_path, dtype=torch.bfloat16)
    input_ids, _ = documents(150)
    prompts = [input_ids[i : i + 3 + i % 9].tolist() for i in range(90)]
    alone = [model.generate([prompt], max_new_tokens=5)[0] for prompt in prompts[:10]]
    assert model.generate(prompts, max_new_tokens=5, batch_size=70)[:10] == alone
    stopped = model.generate(prompts, max_new_tokens=5, batch_size=7, stop=[alone[0][2], alone[1][1:3]])
    assert stopped[0] == alone[0][: alone[0].index(alone[0][2])]
