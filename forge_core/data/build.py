"""Steps 1 to 5 in one: a path becomes a TokenStore, taken from the cache when nothing it depends on has changed."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from .chat_template import ChatTemplateError
from .read import DataError, list_files, read_records
from .sanitize import remove_tokens, sanitize_conversation
from .store import FORMAT_VERSION, INDEX, Sample, TokenStore, write_store
from .tokenize import Tokenizer
from .transform import Conversation, TextRow, to_conversation
from .validate import Problem, raise_problems, validate_row

Kind = Literal["auto", "conversation", "text"]
Overlong = Literal["error", "truncate", "drop", "split"]
_BATCH = 512  # rows that are tokenized together
_MAX_PROBLEMS = 1000  # reading stops after so many: the file is of another kind


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/forge_core/tokens, by default ~/.cache/forge_core/tokens."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "forge_core" / "tokens"


def load_rows(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    columns: Mapping[str, str] | None = None,
    kind: Kind = "auto",
    sanitize: bool = True,
    counts: Counter[str] | None = None,
) -> Iterator[Conversation | TextRow]:
    """Reads, transforms, sanitizes and validates: the rows that can be tokenized, in the order of the files.

    The good rows come out as they are read; problems are collected and raised together once all rows are read.

    Args:
        path, columns: see `read_records`.
        tokenizer: its special tokens must not appear in data.
        kind: "conversation" or "text" if all rows must be of that kind; "auto" takes the kind of the first row.
        sanitize: defuse text that collides with the template; if not, such text is an error. Text rows keep role words
            (no template reads them) and lose only the tokenizer's special tokens.
        counts: "rows" and "sanitized" are counted in it.

    Raises:
        FileNotFoundError, DataError: see the steps; at once for a row that cannot be read.
    """
    counts = Counter() if counts is None else counts
    problems: list[Problem] = []
    special = tokenizer.special_tokens
    for record in read_records(path, columns):
        row = to_conversation(record)
        counts["rows"] += 1
        found: Kind = "text" if isinstance(row, TextRow) else "conversation"
        if kind == "auto":
            kind = found
        if found != kind:
            problems.append(Problem(row.file, row.line, f"a {found} row among {kind} rows; keep one kind per path"))
            continue
        if sanitize:
            cleaned = _sanitize(row, special)
            counts["sanitized"] += cleaned != row
            row = cleaned
        found_problems = validate_row(row, special)
        problems += found_problems
        if len(problems) >= _MAX_PROBLEMS:
            break
        if not found_problems:
            yield row
    raise_problems(problems)


def build_token_store(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    columns: Mapping[str, str] | None = None,
    kind: Kind = "auto",
    max_length: int,
    cache_dir: str | os.PathLike[str] | None = None,
    sanitize: bool = True,
    overlong: Overlong = "error",
) -> TokenStore:
    """Tokenizes a data set, or opens the store made before from the same content, tokenizer, template and options.

    Args:
        path, columns, kind, sanitize: see `load_rows`.
        max_length: tokens a sample may have: the budget of a pack.
        cache_dir: folder of the stores; default `default_cache_dir()`.
        overlong: conversations of more tokens are an "error", or "truncate"d, "drop"ped, or "split" into windows.
            Text is always split: into documents at `[DOC]`, then into windows; every token of it has loss.

    Raises:
        FileNotFoundError: nothing at `path`.
        DataError: see the steps; a conversation over max_length with overlong="error"; no sample left.
        ChatTemplateError: the tokenizer's template does not fit the conversations.
        ValueError: an unknown kind or overlong, max_length below 2.
    """
    for name, value, choices in (
        ("kind", kind, ("auto", "conversation", "text")),
        ("overlong", overlong, ("error", "truncate", "drop", "split")),
    ):
        if value not in choices:
            raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(choices)}")
    if max_length < 2:
        raise ValueError(f"max_length: got {max_length}, expected at least 2 tokens")
    files = list_files(path)
    options = {
        "columns": dict(sorted((columns or {}).items())),
        "kind": kind,
        "max_length": max_length,
        "sanitize": sanitize,
        "overlong": overlong,
    }
    sources = {
        "format": FORMAT_VERSION,
        "content": [[file.name, _file_hash(file)] for file in files],
        "tokenizer": tokenizer.file_hash,
        "template": tokenizer.template_hash,
        "eos": tokenizer.eos_id,
        "options": options,
    }
    key = hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()
    names = [str(file) for file in files]
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    target = folder / key[:32]
    if not (target / INDEX).is_file():
        counts: Counter[str] = Counter()
        rows = load_rows(path, tokenizer, columns=columns, kind=kind, sanitize=sanitize, counts=counts)
        samples = _samples(rows, tokenizer, max_length, overlong, {name: i for i, name in enumerate(names)}, counts)
        info: dict[str, Any] = {"key": key, "files": names, "sources": sources, "counts": counts}
        write_store(target, _not_empty(samples, path, counts), info)
    return TokenStore(target, names)


def _sanitize(row: Conversation | TextRow, special: list[str]) -> Conversation | TextRow:
    if isinstance(row, TextRow):
        return TextRow(remove_tokens(row.text, special), row.file, row.line, row.weight)
    return sanitize_conversation(row, special)


def _samples(
    rows: Iterator[Conversation | TextRow],
    tokenizer: Tokenizer,
    max_length: int,
    overlong: Overlong,
    file_numbers: Mapping[str, int],
    counts: Counter[str],
) -> Iterator[Sample]:
    problems: list[Problem] = []
    while batch := list(islice(rows, _BATCH)):
        for row, ids, mask in _encode(batch, tokenizer):
            if len(ids) > max_length and not isinstance(row, TextRow):
                counts["overlong"] += 1
                if overlong == "error":
                    problems.append(
                        Problem(
                            row.file,
                            row.line,
                            f"the conversation has {len(ids)} tokens, expected at most max_length = {max_length}; "
                            'raise max_length, shorten the row, or set overlong to "truncate", "drop" or "split"',
                        )
                    )
                if overlong in ("error", "drop"):
                    continue
                if overlong == "truncate":
                    ids, mask = ids[:max_length], mask[:max_length]
            for start in range(0, len(ids), max_length):
                window = mask[start : start + max_length]
                if sum(window[1:]) == 0:  # nothing in it is predicted with loss
                    counts["without_loss"] += 1
                    continue
                counts["samples"] += 1
                counts["tokens"] += len(window)
                counts["loss_tokens"] += sum(window[1:])
                tokens = ids[start : start + max_length]
                yield Sample(tokens, window, row.weight, file_numbers[row.file], row.line)
    raise_problems(problems)


def _encode(
    batch: list[Conversation | TextRow], tokenizer: Tokenizer
) -> Iterator[tuple[Conversation | TextRow, list[int], list[int]]]:
    texts = [(row, document) for row in batch if isinstance(row, TextRow) for document in row.documents()]
    for (text_row, _), ids in zip(texts, tokenizer.encode_documents([text for _, text in texts]), strict=True):
        yield text_row, ids, [1] * len(ids)
    chats = [row for row in batch if isinstance(row, Conversation)]
    try:
        encoded = tokenizer.encode_conversations([row.messages for row in chats])
    except ChatTemplateError:
        for row in chats:  # again one by one: the message has to name the row
            try:
                tokenizer.encode_conversation(row.messages)
            except ChatTemplateError as error:
                raise ChatTemplateError(f"{row.file}:{row.line}: {error}") from error
        raise
    for row, (ids, mask) in zip(chats, encoded, strict=True):
        yield row, ids, mask


def _not_empty(samples: Iterator[Sample], path: str | os.PathLike[str], counts: Counter[str]) -> Iterator[Sample]:
    empty = True
    for sample in samples:
        empty = False
        yield sample
    if empty:
        raise DataError(
            f"{path}: no sample is left of {counts['rows']} rows: {counts['overlong']} over max_length, "
            f"{counts['without_loss']} without a token to learn; raise max_length or set overlong to 'split'"
        )


def _file_hash(file: Path) -> str:
    with open(file, "rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()
