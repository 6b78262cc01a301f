from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forge_core.model import load_model
from forge_core.model.prefix import PrefixPack, pack_prefixes

from .tiny import save_peer

SYSTEM = list(range(100, 120))


def rows_by_parents(pack: PrefixPack, document: int) -> list[int]:
    """The rows that the last token of a document sees, from the definition of parents."""
    rows: list[int] = []
    while document >= 0:
        rows = [*range(pack.cu_seqlens[document], pack.cu_seqlens[document + 1]), *rows]
        document = int(pack.parents[document])
    return rows


def check(prompts: list[list[int]]) -> PrefixPack:
    pack = pack_prefixes(prompts)
    assert pack.cu_seqlens.size == pack.parents.size + 1
    assert pack.cu_seqlens[-1] == pack.input_ids.size <= sum(map(len, prompts))
    assert (np.diff(pack.cu_seqlens) > 0).all()
    assert (pack.parents < np.arange(pack.parents.size)).all()
    for prompt, rows in zip(prompts, pack.rows, strict=True):
        assert pack.input_ids[rows].tolist() == prompt
        document = int(np.searchsorted(pack.cu_seqlens, rows[-1], "right")) - 1
        assert rows_by_parents(pack, document) == rows.tolist()
    return pack


# Few different tokens, and pieces long enough to be worth sharing.
pieces = st.sampled_from([[1], [2], [3, 1], [1] * 9, [2] * 17, SYSTEM])


@given(st.lists(st.lists(pieces, min_size=1, max_size=4), min_size=1, max_size=12))
def test_every_prompt_stands_in_the_pack_along_its_ancestors(prompts: list[list[list[int]]]) -> None:
    check([[*chain.from_iterable(parts)] for parts in prompts])


def test_a_shared_prefix_stands_once() -> None:
    prompts = [[*SYSTEM, 1, 2], [*SYSTEM, 3], [7, 8], [*SYSTEM, 1, 4]]
    pack = check(prompts)
    assert pack.input_ids.size == 20 + 2 + 1 + 2 + 2
    assert sorted(pack.parents.tolist()) == [-1, -1, 0, 0, 0] or sorted(pack.parents.tolist()) == [-1, -1, 1, 1, 1]


def test_prefixes_nest() -> None:
    middle = list(range(200, 217))
    prompts = [[*SYSTEM, *middle, 1], [*SYSTEM, *middle, 2], [*SYSTEM, 5], [*SYSTEM, 6]]
    assert check(prompts).input_ids.size == 20 + 17 + 4


@pytest.mark.parametrize("prompt", [SYSTEM, [4]])
def test_equal_prompts_and_one_that_others_continue(prompt: list[int]) -> None:
    pack = check([prompt, [*prompt, 9], prompt])
    assert pack.input_ids.size == (21 if prompt is SYSTEM else 4)  # one token is not worth a document of its own


def test_nothing_shared_is_one_document_each() -> None:
    assert check([[1, 2], [2, 3], [3, 4]]).parents.tolist() == [-1, -1, -1]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_generation_is_that_of_each_prompt_alone(tmp_path: Path, name: str) -> None:
    """Also with windows (gemma2), and with prompts that wait for a free row."""
    save_peer(tmp_path, name)
    model = load_model(tmp_path, dtype=torch.float32)
    shared = [(7 * i) % 60 + 1 for i in range(40)]
    prompts = [[*shared, 3], [*shared, 5, 8], shared, [2, 9], [*shared[:18], 11], [*shared, 3]]
    alone = [model.generate([prompt], max_new_tokens=12)[0] for prompt in prompts]
    assert len({tuple(tokens) for tokens in alone}) > 3
    for batch_size in (3, 64):
        assert model.generate(prompts, max_new_tokens=12, batch_size=batch_size) == alone
