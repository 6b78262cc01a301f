"""The model and the chat data of the end-to-end workloads: those of the demo, fetched and cached as it does.

SmolLM2-135M-Instruct (a 4-bit checkpoint expanded to bfloat16) and the conversations that it wrote itself for the
demo's general data. Both are made once, in $FORGE_CACHE or ~/.cache/forge_core/demo.
"""

import tempfile
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch

from examples.demo import assets
from examples.demo.convert import convert
from examples.demo.data import DATA_SEED, generate_answers
from examples.demo.prompts import rehearsal_prompts
from examples.demo.rehearsal import RehearsalOptions, rehearsal_rows
from examples.demo.rows import write_jsonl
from forge_core.data import BatchStream, PackedBatch, Tokenizer, TokenStore, build_token_store

BUDGET = 2048


@cache
def model_path() -> Path:
    """Directory of the model, in Hugging Face layout."""
    folder = assets.cache_dir()
    return convert(assets.fetch(assets.MODEL, folder), assets.MODEL.member, folder)


@cache
def rows_file() -> Path:
    """All conversations as one JSONL file of {"question", "answer"} rows."""
    rows = rehearsal_rows(
        rehearsal_prompts(DATA_SEED),
        RehearsalOptions(seed=DATA_SEED),
        base=assets.MODEL.sha256,
        cache=assets.cache_dir(),
        generate=lambda prompts, options: generate_answers(model_path(), prompts, options),
    )
    path = Path(tempfile.mkdtemp(prefix="forge-bench-")) / "chat.jsonl"
    write_jsonl([row for category in rows.values() for row in category], path)
    return path


@cache
def store() -> TokenStore:
    """The conversations, tokenized."""
    tokenizer = Tokenizer.from_pretrained(model_path())
    return build_token_store(rows_file(), tokenizer, max_length=BUDGET, cache_dir=rows_file().parent)


@cache
def pack() -> PackedBatch:
    """The first pack of 2048 tokens of a run with seed 0."""
    return BatchStream([store()], [1.0], budget=BUDGET, packs_per_step=1, seed=0).next_step()[0]


@dataclass(frozen=True)
class Row:
    """One conversation as transformers takes it: labels are the inputs, -100 where there is no loss; not shifted."""

    input_ids: torch.Tensor
    labels: torch.Tensor


def rows_of(batch: PackedBatch) -> list[Row]:
    """The documents of a pack."""
    bounds = batch.cu_seqlens.tolist()
    # targets[i] is what follows token i; transformers shifts by itself, so its label stands at token i + 1.
    labels = batch.targets.roll(1)
    labels[bounds[:-1]] = -100
    return [Row(batch.input_ids[a:b], labels[a:b]) for a, b in pairwise(bounds)]
