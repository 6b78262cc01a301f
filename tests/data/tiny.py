"""A tiny byte-level BPE tokenizer with a ChatML template, made in memory."""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from forge_core.data import ChatTemplate, Tokenizer

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SENTENCES = [
    "The quick brown fox jumps over the lazy dog.\n\nWhat is the code of cholera? It is A00, doctor.\n",
    "system user assistant answers questions about diseases and their chapters.\n\n\n",
    "One two three four five six seven eight nine ten, said the teacher to the class.\n",
]


GENERIC_QA: dict[str, object] = {"question": "What is the code?", "answer": "It is A00."}


def tiny_backend() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES * 4, trainer)
    return backend


def tiny_tokenizer(template: str | None = CHATML) -> Tokenizer:
    names = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "pad_token": "<|endoftext|>"}
    return Tokenizer(
        tiny_backend(), named_tokens=names, template=None if template is None else ChatTemplate(template, names)
    )


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def questions(count: int, words: int = 3) -> list[dict[str, object]]:
    return [
        {
            "question": f"What is item {i}?",
            "answer": " ".join(["ten", "two", "fox"][(i + j) % 3] for j in range(words + i % 5)),
        }
        for i in range(count)
    ]
