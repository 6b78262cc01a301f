"""Tokenisation of chat rows: the store builder (read, check, template, tokens, loss mask, write) and its peers."""

import json
import tempfile
from itertools import count
from pathlib import Path

from bench.e2e import chat
from bench.registry import Candidates, Thunk, peer, workload
from forge_core.data import Tokenizer, build_token_store

COPIES = 5


def _conversations() -> list[list[dict[str, str]]]:
    rows = [json.loads(line) for line in chat.chat_file().read_text().splitlines()]
    pairs = [(row["question"], row["answer"]) for row in rows]
    return [
        [{"role": "user", "content": f"{question} ({copy})"}, {"role": "assistant", "content": answer}]
        for copy in range(COPIES)
        for question, answer in pairs
    ]


def store_builder(folder: Path) -> Thunk:
    """A new cache folder for each call: nothing is reused."""
    tokenizer, numbers = Tokenizer.from_pretrained(chat.model_path()), count()
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in _conversations()))
    return lambda: build_token_store(file, tokenizer, max_length=8192, cache_dir=folder / str(next(numbers)))


def plain_tokenizers() -> Thunk:
    """The tokenizers package alone, on rendered text in one batch: no reading, no mask, nothing written."""
    tokenizer = Tokenizer.from_pretrained(chat.model_path())
    texts = [tokenizer.apply_chat_template(messages) for messages in _conversations()]
    return lambda: tokenizer.backend.encode_batch(texts, add_special_tokens=False)


def transformers_template() -> Thunk:
    """transformers: template and tokens row by row; without a loss mask, which needs a template made for it."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(chat.model_path())
    rows = _conversations()
    return lambda: [tokenizer.apply_chat_template(messages) for messages in rows]


def _register() -> None:
    tokens = COPIES * int(chat.store(chat.chat_file()).token_counts.sum())

    @workload(
        "build_token_store",
        f"{COPIES * len(chat.store(chat.chat_file())):,} conversations, {tokens:,} tokens",
        suite="data",
        dtype="int32",
        tokens=tokens,
        note="build_token_store writes the store and checks rows; plain tokenizers is the floor of its encoding alone.",
    )
    def build() -> Candidates:
        folder = Path(tempfile.mkdtemp(prefix="forge-bench-"))
        return {
            "forge": store_builder(folder),
            "plain tokenizers": plain_tokenizers(),
            "transformers": peer("transformers", transformers_template, rounds=3),
        }


_register()
