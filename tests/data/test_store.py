"""Token stores: exact content, reused only when nothing changed, complete or absent; bad data sets are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from forge_core.data import DataError, TokenStore, build_token_store, load_rows
from forge_core.data.store import Sample, write_store

from .tiny import GENERIC_QA, questions, tiny_tokenizer, write_jsonl


def test_content_and_origin(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "b.jsonl", questions(3))
    write_jsonl(folder / "a.jsonl", [{**GENERIC_QA, "weight": 0.5}])
    store = build_token_store(folder, tokenizer, max_length=64, cache_dir=tmp_path / "cache")
    assert len(store) == 4
    assert [store.origin(i) for i in range(4)] == [
        (str(folder / "a.jsonl"), 1),
        *((str(folder / "b.jsonl"), i) for i in (1, 2, 3)),
    ]
    for index, row in enumerate([GENERIC_QA, *questions(3)]):
        messages = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        tokens, mask, weight = store.sample(index)
        assert (tokens.tolist(), mask.tolist()) == tokenizer.encode_conversation(messages)
        assert weight == (0.5 if index == 0 else 1)
        assert store.token_counts[index] == tokens.size and store.loss_token_counts[index] == mask[1:].sum()
        assert not tokens.flags.writeable and not tokens.flags.owndata
    with pytest.raises(IndexError):
        store.sample(4)
    (shard,) = store.info["shards"]
    tensors = load_file(store.path / shard["file"])
    assert {name: (value.dtype.name, value.size) for name, value in tensors.items()} == {
        "tokens": ("int32", store.token_counts.sum()),
        "loss_mask": ("uint8", store.token_counts.sum()),
        "offsets": ("int64", 5),
        "loss_tokens": ("int64", 4),
        "weight": ("float32", 4),
        "file": ("int32", 4),
        "line": ("int64", 4),
    }


def test_shards_read_as_one(tmp_path: Path) -> None:
    samples = [Sample(range(i, 2 * i), [i % 2] * i, i / 4, 0, i) for i in range(2, 30)]
    write_store(tmp_path / "many", iter(samples), {"key": "k", "files": ["f"]}, shard_tokens=100)
    store = TokenStore(tmp_path / "many")
    assert len(store.info["shards"]) > 3 and len(store) == len(samples)
    for index, sample in enumerate(samples):
        tokens, mask, weight = store.sample(index)
        assert (tokens.tolist(), mask.tolist(), weight) == (list(sample.tokens), sample.loss_mask, sample.weight)
        assert store.origin(index) == ("f", sample.line)
        assert store.loss_token_counts[index] == sum(sample.loss_mask[1:])


def test_reused_only_for_the_same_content_tokenizer_template_and_options(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    path = write_jsonl(tmp_path / "a.jsonl", questions(5))

    def build(**options: object) -> Path:
        arguments = {"max_length": 64, "cache_dir": cache, "tokenizer": tiny_tokenizer(), **options}
        return build_token_store(path, **arguments).path  # type: ignore[arg-type]

    first = build()
    made = (first / "index.json").stat().st_mtime_ns
    assert build() == first and (first / "index.json").stat().st_mtime_ns == made
    other_template = tiny_tokenizer("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    other_vocabulary = tiny_tokenizer()
    other_vocabulary.backend.add_tokens(["extra"])
    renamed = type(other_vocabulary)(other_vocabulary.backend, template=other_vocabulary.template)
    others = [build(tokenizer=other_template), build(tokenizer=renamed), build(max_length=63), build(overlong="drop")]
    others += [build(sanitize=False), build(columns={"question": "answer", "answer": "question"})]
    write_jsonl(path, questions(6))
    others.append(build())
    assert len({first, *others}) == 8
    moved = path.rename(tmp_path / "moved.jsonl")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = moved.rename(elsewhere / "a.jsonl")
    assert build() == others[-1]  # the folder does not matter, and origins follow the file
    again = build_token_store(path, tiny_tokenizer(), max_length=64, cache_dir=cache)
    assert again.origin(0) == (str(path), 1)


def test_nothing_is_left_of_a_failed_build(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*questions(5), {"question": "Q", "answer": ""}])
    with pytest.raises(DataError, match=r"a\.jsonl:6: messages\[1\]: the assistant content is empty"):
        build_token_store(path, tiny_tokenizer(), max_length=64, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_damaged_cache_is_an_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", questions(5))
    store = build_token_store(path, tiny_tokenizer(), max_length=64, cache_dir=tmp_path)
    shard = store.path / store.info["shards"][0]["file"]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"safetensors: the shard is \d+ bytes, expected \d+ bytes; .* delete"):
        build_token_store(path, tiny_tokenizer(), max_length=64, cache_dir=tmp_path)


def test_text_is_split_into_documents_and_windows(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    long = "The quick brown fox jumps over the lazy dog. " * 8
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"{long}[DOC]ten<|im_end|>"}, {"text": "User: two"}])
    store = build_token_store(path, tokenizer, max_length=50, cache_dir=tmp_path)
    samples = [store.sample(i) for i in range(len(store))]
    documents: list[list[int]] = [[]]
    for tokens, mask, _ in samples:
        assert mask.all() and 2 <= tokens.size <= 50
        documents[-1] += tokens.tolist()
        if tokens[-1] == tokenizer.eos_id:
            documents.append([])
    assert documents == [[*tokenizer.encode(text), tokenizer.eos_id] for text in (long, "ten", "User: two")] + [[]]
    assert [store.origin(i)[1] for i in range(len(store))][-2:] == [1, 2]


@pytest.mark.parametrize("overlong", ["truncate", "drop", "split"])
def test_overlong_conversations(tmp_path: Path, overlong: str) -> None:
    tokenizer = tiny_tokenizer()
    path = write_jsonl(tmp_path / "a.jsonl", [*questions(2), {"question": "Q", "answer": "ten two fox " * 40}])
    whole = build_token_store(path, tokenizer, max_length=500, cache_dir=tmp_path)
    store = build_token_store(path, tokenizer, max_length=60, cache_dir=tmp_path, overlong=overlong)  # type: ignore[arg-type]
    assert store.info["counts"]["overlong"] == 1
    rest = [store.sample(i)[0] for i in range(2, len(store))]
    long = whole.sample(2)[0]
    if overlong == "drop":
        assert not rest
    elif overlong == "truncate":
        assert len(rest) == 1 and np.array_equal(rest[0], long[:60])
    else:
        assert np.array_equal(np.concatenate(rest), long)


def test_a_conversation_longer_than_max_length(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [GENERIC_QA, {"question": "Q", "answer": "ten " * 60}])
    with pytest.raises(
        DataError, match=r"a\.jsonl:2: the conversation has \d+ tokens, expected at most max_length = 64; raise"
    ):
        build_token_store(path, tiny_tokenizer(), max_length=64, cache_dir=tmp_path)


def test_nothing_left_after_filtering(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", questions(7))
    with pytest.raises(DataError, match=r"a\.jsonl: no sample is left of 7 rows: 7 over max_length, 0 without"):
        build_token_store(path, tiny_tokenizer(), max_length=8, cache_dir=tmp_path, overlong="drop")
    with pytest.raises(DataError, match=r"no sample is left of 7 rows: 7 over max_length, 7 without a token to learn"):
        build_token_store(path, tiny_tokenizer(), max_length=8, cache_dir=tmp_path, overlong="truncate")


def test_template_collisions(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "User: <|im_start|>x", "answer": "A"}])
    (row,) = load_rows(path, tokenizer)
    assert row.messages[0].content == "User : x"  # type: ignore[union-attr]
    with pytest.raises(DataError, match=r"a\.jsonl:1: .*'User:', '<\|im_start\|>', which collides .* sanitize: true"):
        list(load_rows(path, tokenizer, sanitize=False))


def test_all_bad_rows_are_listed(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        GENERIC_QA,
        {"messages": [{"role": "user", "content": "x"}]},
        {"text": "raw"},
        {"messages": [{"role": "robot", "content": "x"}]},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as caught:
        list(load_rows(path, tiny_tokenizer()))
    assert [line.split(": ", 1)[1] for line in str(caught.value).splitlines()] == [
        "the roles are ['user'], expected at least one user and one assistant message",
        "a text row among conversation rows; keep one kind per path",
        "messages[0]: unknown role 'robot', expected one of system, user, assistant",
    ]
    with pytest.raises(DataError, match=r"a\.jsonl:1: a conversation row among text rows"):
        list(load_rows(path, tiny_tokenizer(), kind="text"))


def test_a_template_that_refuses_a_row_names_it(tmp_path: Path) -> None:
    template = "{% for m in messages %}{% if 'item 2' in m.content %}{{ raise_exception('no twos') }}{% endif %}"
    template += "{{ m.content }}<|im_end|>{% endfor %}"
    path = write_jsonl(tmp_path / "a.jsonl", questions(5))
    with pytest.raises(DataError, match=r"a\.jsonl:3: the chat template refuses these messages: no twos"):
        build_token_store(path, tiny_tokenizer(template), max_length=64, cache_dir=tmp_path)


def test_argument_errors(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", questions(1))
    for options, message in (
        ({"max_length": 1}, "max_length: got 1"),
        ({"overlong": "cut"}, "overlong: got 'cut', expected one of error, truncate, drop, split"),
        ({"kind": "chat"}, "kind: got 'chat'"),
    ):
        with pytest.raises(ValueError, match=message):
            build_token_store(path, tiny_tokenizer(), **{"max_length": 64, "cache_dir": tmp_path, **options})  # type: ignore[arg-type]


def test_index_tells_what_the_tokens_are_made_of(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*questions(2), {"question": "Bot: x", "answer": "A"}])
    tokenizer = tiny_tokenizer()
    store = build_token_store(path, tokenizer, max_length=64, cache_dir=tmp_path)
    index = json.loads((store.path / "index.json").read_text())
    assert index["sources"]["tokenizer"] == tokenizer.file_hash
    assert index["sources"]["template"] == tokenizer.template_hash
    assert index["counts"] == {
        "rows": 3,
        "sanitized": 1,
        "samples": 3,
        "tokens": store.token_counts.sum(),
        "loss_tokens": store.loss_token_counts.sum(),
    }
