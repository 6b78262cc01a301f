"""One policy-gradient LoRA step on eight answers to one prompt, which is computed once, against a row for each answer.

Both are forge_core's own step on random tokens (a step's time does not depend on them) and must return the same loss.
Separate rows go two at a time, and their gradients add up: all at once they would not fit a small machine.
"""

import torch
from torch import Tensor

from bench import flops
from bench.e2e import chat
from bench.registry import Candidates, Slow, Thunk, workload
from forge_core.data import answer_rows
from forge_core.kernels import PackPlan, policy_gradient_loss
from forge_core.model import LoraConfig, ModelConfig, adapter_parameters, add_lora, load_model
from forge_core.train.optimizer import MasterAdamW

RANK, ALPHA, LEARNING_RATE = 32, 64, 1e-5
PROMPT, ANSWERS, ANSWER, ROWS_AT_ONCE = 1024, 8, 256, 2


def step(group: Tensor, shared: bool) -> Thunk:
    """A step on `group`, int64 [ANSWERS, PROMPT + ANSWER]: the same prompt and another answer in each row."""
    model = load_model(chat.model_path(), dtype=torch.bfloat16)
    add_lora(model, LoraConfig(rank=RANK, alpha=ALPHA))
    model.train()
    optimizer = MasterAdamW(adapter_parameters(model))
    packs = []
    for rows in [group] if shared else group.split(ROWS_AT_ONCE):
        # Without sharing an answer still continues a prompt, but one of its own.
        prompts = rows[:1] if shared else rows
        lengths = [PROMPT] + [ANSWER] * ANSWERS if shared else [PROMPT, ANSWER] * len(rows)
        parents = [-1] + [0] * ANSWERS if shared else [p for i in range(len(rows)) for p in (-1, 2 * i)]
        ids = torch.cat([prompts[0, :PROMPT], rows[:, PROMPT:].flatten()]) if shared else rows.flatten()
        bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        tree = torch.tensor(parents, dtype=torch.int32)
        whole = torch.arange(0, ids.numel() + 1, PROMPT + ANSWER, dtype=torch.int32)
        packs.append((ids, bounds if shared else whole, tree if shared else None, answer_rows(bounds, tree)))
    advantages = torch.linspace(-1, 1, ANSWERS * ANSWER)
    old_logprobs = torch.full((ANSWERS * ANSWER,), -10.0)

    def run() -> float:
        total, seen = 0.0, 0
        for ids, bounds, parents, answers in packs:
            plan = PackPlan(bounds.numpy(), parents=None if parents is None else parents.numpy())
            hidden = model(ids, bounds, parents=parents, plan=plan)[answers.rows]
            targets = ids[answers.tokens]
            count = len(targets)
            loss = policy_gradient_loss(
                hidden, model.lm_head_weight, targets, advantages[seen : seen + count], old_logprobs[:count],
                normalizer=float(ANSWERS * ANSWER), counted_rows=count,
            ).loss  # fmt: skip
            seen += count
            loss.backward()
            total += loss.item()
        optimizer.step(LEARNING_RATE)
        return total

    return run


def _register() -> None:
    config = ModelConfig.from_file(chat.model_path() / "config.json")
    tokens, repeated = PROMPT + ANSWERS * ANSWER, ANSWERS * (PROMPT + ANSWER)
    loss_rows = ANSWERS * ANSWER
    separate = flops.lora_step(config, [PROMPT + ANSWER] * ANSWERS, loss_rows, RANK)
    # The prompt's matmuls and pairs once: seven rows' worth of them less.
    once = separate - (ANSWERS - 1) * flops.lora_step(config, [PROMPT], 0, RANK)

    @workload(
        "policy_step",
        f"SmolLM2-135M LoRA r{RANK}, {ANSWERS} answers of {ANSWER} tokens to a prompt of {PROMPT}",
        suite="e2e",
        flops=once,
        tokens=tokens,
        note=f"{flops.LORA_STEP} Separate rows have {separate / once:.2f} times the FLOPs ({repeated} instead of "
        f"{tokens} rows; the loss has the same).",
        at_least={"separate rows": 2.5},
    )
    def build() -> Candidates:
        generator = torch.Generator().manual_seed(0)
        group = torch.randint(config.vocab_size, (ANSWERS, PROMPT + ANSWER), generator=generator)
        group[:, :PROMPT] = group[0, :PROMPT]
        return {"forge": step(group, shared=True), "separate rows": Slow(step(group, shared=False), 2)}


_register()
