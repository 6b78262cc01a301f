"""Greedy decoding of a batch of chat prompts against transformers' generate, prefill included."""

import torch

from bench.e2e import chat
from bench.registry import Candidates, Thunk, peer, workload
from forge_core.model import ModelConfig, load_model
from forge_core.model.prefix import pack_prefixes

BATCH, NEW_TOKENS = 32, 48

Prompts = list[list[int]]


def chat_prompts() -> Prompts:
    """The first conversations up to where the answer begins; all start with the same system message."""
    result = []
    for index in range(BATCH):
        tokens, loss_mask, _ = chat.store(chat.chat_file()).sample(index)
        result.append(tokens[: int(loss_mask.argmax())].tolist())
    return result


def unlike_prompts() -> Prompts:
    """The same behind one token of their own each, so that none shares a prefix with another."""
    return [[1000 + i, *prompt[1:]] for i, prompt in enumerate(chat_prompts())]


def forge(ids: Prompts) -> Thunk:
    """forge_core's own generation."""
    model = load_model(chat.model_path(), dtype=torch.bfloat16)
    return lambda: model.generate(ids, max_new_tokens=NEW_TOKENS)


def transformers_generate(ids: Prompts) -> Thunk:
    """transformers with left padding and its dynamic cache; ends of sequences do not stop it."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(chat.model_path(), dtype=torch.bfloat16).eval()
    longest = max(map(len, ids))
    input_ids = torch.tensor([[0] * (longest - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(input_ids, attention_mask=mask, **options)


def _register(ids: Prompts, shared: str) -> None:
    c = ModelConfig.from_file(chat.model_path() / "config.json")
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    layer = c.hidden_size * (2 * q + 2 * kv + 3 * c.intermediate_size)
    head = c.hidden_size * c.vocab_size
    prefilled = pack_prefixes(ids).input_ids.size
    decoded = BATCH * (NEW_TOKENS - 1)  # the first new token comes from the prefill

    @workload(
        "decode",
        f"SmolLM2-135M, batch {BATCH}, {sum(map(len, ids))} prompt tokens {shared}, {NEW_TOKENS} new ones each, greedy",
        suite="e2e",
        flops=2.0 * (c.num_layers * layer * (prefilled + decoded) + head * BATCH * NEW_TOKENS),
        bytes=2.0 * (c.num_layers * layer + head) * NEW_TOKENS,
        tokens=BATCH * NEW_TOKENS,
        note="Decoding: new tokens/s, the time includes the prefill; FLOPs 2 N a token, those of a prefix that prompts "
        "share once; bytes the weights once a step. transformers' generate shares no prefixes.",
        at_least={"transformers generate": 3.0},
        headline=True,
    )
    def build() -> Candidates:
        return {
            "forge": forge(ids),
            "transformers generate": peer("transformers", lambda: transformers_generate(ids), rounds=3),
        }


_register(chat_prompts(), "that begin alike")
_register(unlike_prompts(), "that share nothing")
