"""The model and the data of the end-to-end workloads: those of the demo, fetched and cached as it does.

SmolLM2-135M-Instruct (a 4-bit checkpoint expanded to bfloat16), the conversations that it wrote itself for the demo's
general data, and the demo's domain rows. All are made once, in $FORGE_CACHE or ~/.cache/forge_core/demo.
"""

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch

from examples.demo import assets, domain
from examples.demo.convert import convert
from examples.demo.data import DATA_SEED, generate_answers
from examples.demo.prompts import rehearsal_prompts
from examples.demo.rehearsal import RehearsalOptions, rehearsal_rows
from examples.demo.rows import Row, question_row, write_jsonl
from forge_core.data import BatchStream, PackedBatch, Tokenizer, TokenStore, build_token_store

BUDGET = 2048


@cache
def model_path() -> Path:
    """Directory of the model, in Hugging Face layout."""
    folder = assets.cache_dir()
    return convert(assets.fetch(assets.MODEL, folder), assets.MODEL.member, folder)


@cache
def chat_file() -> Path:
    """The conversations as a JSONL file of {"question", "answer"} rows."""
    rows = rehearsal_rows(
        rehearsal_prompts(DATA_SEED),
        RehearsalOptions(seed=DATA_SEED),
        base=assets.MODEL.sha256,
        cache=assets.cache_dir(),
        generate=lambda prompts, options: generate_answers(model_path(), prompts, options),
    )
    return _written("chat", (row for category in rows.values() for row in category))


@cache
def domain_file() -> Path:
    """The domain's questions and short answers, likewise; without the demo's weights, which peers do not know."""
    diagnoses = domain.parse_tabular(assets.read_asset(assets.ICD, assets.cache_dir()))
    rows = [domain.to_row(diagnosis) for diagnosis in domain.split_by_category(diagnoses, seed=DATA_SEED).train]
    return _written("domain", (question_row(str(row["question"]), str(row["answer"])) for row in rows))


def _written(name: str, rows: Iterable[Row]) -> Path:
    path = Path(tempfile.mkdtemp(prefix="forge-bench-")) / f"{name}.jsonl"
    write_jsonl(rows, path)
    return path


@cache
def store(file: Path) -> TokenStore:
    """The rows of a file, tokenized."""
    return build_token_store(file, Tokenizer.from_pretrained(model_path()), max_length=BUDGET, cache_dir=file.parent)


@cache
def pack(data: str) -> PackedBatch:
    """The first pack of 2048 tokens of a run with seed 0: "chat" alone, or "mix", half of the tokens domain rows."""
    files = {"chat": [chat_file()], "mix": [domain_file(), chat_file()]}[data]
    stores = [store(file) for file in files]
    return BatchStream(stores, [1 / len(stores)] * len(stores), budget=BUDGET, packs_per_step=1, seed=0).next_step()[0]


@dataclass(frozen=True)
class Example:
    """One document as transformers takes it: labels are the inputs, -100 where there is no loss; not shifted."""

    input_ids: torch.Tensor
    labels: torch.Tensor


def examples(batch: PackedBatch) -> list[Example]:
    """The documents of a pack."""
    bounds = batch.cu_seqlens.tolist()
    # targets[i] is what follows token i; transformers shifts by itself, so its label stands at token i + 1.
    labels = batch.targets.roll(1)
    labels[bounds[:-1]] = -100
    return [Example(batch.input_ids[a:b], labels[a:b]) for a, b in pairwise(bounds)]
