"""One LoRA step on one pack of chat data - forward, loss, backward, clipping, AdamW - against transformers and TRL.

Every candidate trains the same documents with adapters of rank 32 on all linear layers (float32, on a bfloat16 base),
fused AdamW and clipping at norm 1, and must return the same loss.
"""

import os
import tempfile
from typing import Any

import torch

from bench import flops
from bench.e2e import chat
from bench.registry import Candidates, Thunk, peer, workload
from forge_core.data import PackedBatch
from forge_core.kernels import PackPlan, weighted_linear_cross_entropy
from forge_core.model import LoraConfig, ModelConfig, adapter_parameters, add_lora, load_model
from forge_core.train.optimizer import MasterAdamW

RANK, ALPHA, LEARNING_RATE = 32, 64, 1e-5


def forge(batch: PackedBatch) -> Thunk:
    """The step as forge_core's trainer makes it."""
    model = load_model(chat.model_path(), dtype=torch.bfloat16)
    add_lora(model, LoraConfig(rank=RANK, alpha=ALPHA))
    model.train()
    optimizer = MasterAdamW(adapter_parameters(model))
    normalizer, sources = float(batch.token_weights.sum()), int(batch.source_ids.max()) + 1

    def step() -> float:
        hidden = model(batch.input_ids, batch.cu_seqlens, plan=PackPlan(batch.cu_seqlens.numpy()))
        loss = weighted_linear_cross_entropy(
            hidden, model.lm_head_weight, batch.targets, batch.token_weights, source_ids=batch.source_ids,
            num_sources=sources, normalizer=normalizer, counted_rows=batch.counted_rows,
        ).loss  # fmt: skip
        loss.backward()
        optimizer.step(LEARNING_RATE)
        return loss.item()

    return step


def transformers_model() -> Any:
    """The same model in transformers with PEFT's default adapters."""
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(chat.model_path(), dtype=torch.bfloat16)
    model.config.use_cache = False
    return peft.get_peft_model(model, peft_config()).train()


def peft_config() -> Any:
    """Adapters as forge_core's: rank, alpha, all linear layers, no dropout."""
    import peft

    return peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")


def transformers_step(**inputs: torch.Tensor) -> Thunk:
    """A step of transformers + PEFT on these inputs."""
    model = transformers_model()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step() -> float:
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def packed(batch: PackedBatch) -> Thunk:
    """One row; transformers finds the documents from position_ids and gives SDPA a block mask."""
    rows = chat.examples(batch)
    return transformers_step(
        input_ids=torch.cat([row.input_ids for row in rows])[None],
        labels=torch.cat([row.labels for row in rows])[None],
        position_ids=torch.cat([torch.arange(len(row.input_ids)) for row in rows])[None],
    )


def padded(batch: PackedBatch) -> Thunk:
    """One row per document, all as long as the longest."""
    rows = chat.examples(batch)
    pad = torch.nn.utils.rnn.pad_sequence
    return transformers_step(
        input_ids=pad([row.input_ids for row in rows], batch_first=True),
        attention_mask=pad([torch.ones_like(row.input_ids) for row in rows], batch_first=True),
        labels=pad([row.labels for row in rows], batch_first=True, padding_value=-100),
    )


def trl_step(batch: PackedBatch) -> Thunk:
    """A step of TRL's SFTTrainer with best-fit packing: its own data preparation, collator, loss and metrics."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import datasets
    import transformers
    import trl

    rows = chat.examples(batch)
    table = [{"input_ids": row.input_ids.tolist(), "labels": row.labels.tolist()} for row in rows]
    trainer = trl.SFTTrainer(
        transformers.AutoModelForCausalLM.from_pretrained(chat.model_path(), dtype=torch.bfloat16),
        args=trl.SFTConfig(
            output_dir=tempfile.mkdtemp(prefix="forge-bench-"), packing=True, max_length=chat.BUDGET,
            per_device_train_batch_size=1, learning_rate=LEARNING_RATE, lr_scheduler_type="constant",
            optim="adamw_torch_fused", adam_beta2=0.95, max_grad_norm=1.0, max_steps=1000,
            gradient_checkpointing=False, bf16=False, use_cpu=True, report_to="none", disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(table),
        processing_class=transformers.AutoTokenizer.from_pretrained(chat.model_path()),
        peft_config=peft_config(),
    )  # fmt: skip
    inputs = next(iter(trainer.get_train_dataloader()))
    optimizer = trainer.create_optimizer()
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    trainer.current_gradient_accumulation_steps = 1

    def step() -> float:
        loss = trainer.training_step(trainer.model, dict(inputs))
        trainer.accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _register(data: str, name: str, headline: bool) -> None:
    batch = chat.pack(data)
    lengths = batch.cu_seqlens.diff().tolist()
    config = ModelConfig.from_file(chat.model_path() / "config.json")
    useful = flops.lora_step(config, lengths, batch.loss_tokens, RANK)
    counted = flops.lora_step(config, lengths, batch.tokens, RANK)

    @workload(
        "sft_step",
        f"SmolLM2-135M LoRA r{RANK}, {name}: {batch.tokens} tokens, {len(lengths)} documents up to {max(lengths)}",
        suite="e2e",
        flops=counted,
        tokens=batch.tokens,
        note=f"{flops.LORA_STEP} N includes the head for every token; counted only where there is loss "
        f"({batch.loss_tokens} of {batch.tokens} tokens), the percentage of {name} is {useful / counted:.3f} x that.",
        at_least={"transformers + PEFT packed": 2.0, "TRL SFTTrainer": 2.0, "transformers + PEFT padded": 6.0},
        headline=headline,
    )
    def build() -> Candidates:
        return {
            "forge": forge(batch),
            "transformers + PEFT packed": peer("peft", lambda: packed(batch), rounds=3),
            "TRL SFTTrainer": peer("trl", lambda: trl_step(batch), rounds=2),
            "transformers + PEFT padded": peer("peft", lambda: padded(batch), rounds=2),
        }


_register("chat", "chat", headline=True)
_register("mix", "chat and short domain rows", headline=True)
