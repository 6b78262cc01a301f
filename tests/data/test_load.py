"""The stream of steps: exact shares, exact packs, exact resume."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_core.data import BatchStream, DataError, PackedBatch, TokenStore, build_token_store, iterate_packs
from forge_core.data.store import Sample, write_store

from .tiny import SENTENCES, questions, tiny_tokenizer, write_jsonl

BUDGET = 96


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[TokenStore]:
    """Chats with little loss, raw text, and a source so small that steps span its epochs."""
    folder = tmp_path_factory.mktemp("data")
    paths = [
        write_jsonl(folder / "chat.jsonl", questions(40)),
        write_jsonl(
            folder / "text.jsonl",
            [{"text": text[: 40 + 7 * i], "weight": 0.25} for i, text in enumerate(SENTENCES * 3)],
        ),
        write_jsonl(folder / "few.jsonl", questions(3, words=9)),
    ]
    return [build_token_store(path, tiny_tokenizer(), max_length=BUDGET, cache_dir=folder) for path in paths]


def stream(stores: list[TokenStore], **changes: object) -> BatchStream:
    arguments = {"shares": [0.5, 0.3, 0.2], "budget": BUDGET, "packs_per_step": 3, "seed": 11, **changes}
    return BatchStream(stores, **arguments)  # type: ignore[arg-type]


def same(a: list[PackedBatch], b: list[PackedBatch]) -> bool:
    names = ("input_ids", "targets", "token_weights", "source_ids", "cu_seqlens")
    return len(a) == len(b) and all(
        x.sample_ids == y.sample_ids and all(torch.equal(getattr(x, name), getattr(y, name)) for name in names)
        for x, y in zip(a, b, strict=True)
    )


def check_pack(pack: PackedBatch, stores: list[TokenStore], budget: int) -> None:
    expected = {
        "input_ids": torch.int64,
        "targets": torch.int64,
        "token_weights": torch.float32,
        "source_ids": torch.int32,
    }
    assert {name: getattr(pack, name).dtype for name in expected} == expected
    assert all(getattr(pack, name).shape == (budget,) for name in expected)
    offsets = pack.cu_seqlens.tolist()
    assert pack.cu_seqlens.dtype == torch.int32 and offsets[0] == 0 and len(offsets) == len(pack.sample_ids) + 1
    for (source, index), start, end in zip(pack.sample_ids, offsets[:-1], offsets[1:], strict=True):
        tokens, mask, weight = stores[source].sample(index)
        assert pack.input_ids[start:end].tolist() == tokens.tolist()
        for i in range(tokens.size):
            trained = i + 1 < tokens.size and mask[i + 1] == 1
            assert pack.targets[start + i] == (tokens[i + 1] if trained else -100)
            assert pack.token_weights[start + i] == (weight if trained else 0)
        assert (pack.source_ids[start:end] == source).all()
    tail = slice(offsets[-1], None)
    assert (pack.targets[tail] == -100).all() and not pack.token_weights[tail].any() and not pack.input_ids[tail].any()
    assert pack.tokens == offsets[-1] <= budget
    assert pack.loss_tokens == sum(stores[source].loss_token_counts[index] for source, index in pack.sample_ids)


def test_packs_are_exact(stores: list[TokenStore]) -> None:
    steps = stream(stores)
    for _ in range(20):
        packs = steps.next_step()
        assert len(packs) == 3
        for pack in packs:
            check_pack(pack, stores, BUDGET)


@pytest.mark.parametrize("share_of", ["tokens", "loss_tokens"])
def test_shares_are_met_after_every_step(stores: list[TokenStore], share_of: str) -> None:
    steps = stream(stores, share_of=share_of)
    wanted = [0.5, 0.3, 0.2]
    seen: Counter[tuple[int, int]] = Counter()
    for _ in range(60):
        packs = steps.next_step()
        seen.update(sample for pack in packs for sample in pack.sample_ids)
        realised = steps.realised_shares()
        counts = np.array([entry[share_of] for entry in realised])
        # One sequence from the mixer; the rest are samples that filled gaps ahead of their turn, one pack at most.
        assert np.abs(counts - np.multiply(wanted, counts.sum())).max() <= 2 * BUDGET
    for source, (entry, store) in enumerate(zip(realised, stores, strict=True)):
        numbers = [seen[source, index] for index in range(len(store))]
        assert entry["samples"] == sum(numbers) and entry["epochs"] == sum(numbers) / len(store)
        assert entry["tokens"] == np.dot(numbers, store.token_counts)
        assert entry["loss_tokens"] == np.dot(numbers, store.loss_token_counts)
        assert entry[share_of[:-1] + "_share"] == pytest.approx(wanted[source], abs=0.02)
        assert max(numbers) - min(numbers) <= 2  # whole epochs, but for samples that still wait


def test_no_sample_waits_for_ever(tmp_path: Path) -> None:
    """One sample in fifty is as long as a pack: it fits no gap and must get a pack of its own in its turn."""
    samples = [Sample([1] * (100 if i == 0 else 30), [1] * (100 if i == 0 else 30), 1.0, 0, i) for i in range(50)]
    write_store(tmp_path / "s", iter(samples), {"key": "k", "files": ["f"]})
    steps = BatchStream([TokenStore(tmp_path / "s")], [1.0], budget=100, packs_per_step=1, seed=0)
    taken = [sample for _ in range(200) for pack in steps.next_sample_ids() for sample in pack]
    positions = [place for place, (_, index) in enumerate(taken) if index == 0]
    assert len(positions) >= 10 and max(np.diff(positions)) <= 100 + 4


def test_packs_are_full(tmp_path: Path) -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 1, 3000), 2, 2048).astype(int)
    samples = [Sample(np.zeros(n, np.int32), np.ones(n, np.uint8), 1.0, 0, i) for i, n in enumerate(lengths)]
    write_store(tmp_path / "s", iter(samples), {"key": "k", "files": ["f"]})
    store = TokenStore(tmp_path / "s")
    for packs_per_step in (1, 8):
        steps = BatchStream([store], [1.0], budget=2048, packs_per_step=packs_per_step, seed=0)
        used = [store.token_counts[[i for _, i in pack]].sum() for _ in range(60) for pack in steps.next_sample_ids()]
        assert np.mean(used) / 2048 > 0.99 and min(used) / 2048 > 0.95


@settings(max_examples=25, deadline=None)
@given(stop=st.integers(0, 25), seed=st.integers(-(2**70), 2**70), share_of=st.sampled_from(["tokens", "loss_tokens"]))
def test_restore_gives_the_same_batches(stores: list[TokenStore], stop: int, seed: int, share_of: str) -> None:
    whole = stream(stores, seed=seed, share_of=share_of)
    for _ in range(stop):
        whole.next_sample_ids()
    state = json.loads(json.dumps(whole.state()))
    resumed = stream(stores, seed=seed, share_of=share_of)
    resumed.next_step()  # whatever it did before
    resumed.restore(state)
    resumed.verify(state)
    for _ in range(4):
        assert same(whole.next_step(), resumed.next_step())
    assert whole.state() == resumed.state()
    assert (resumed.step, resumed.chain) == (stop + 4, whole.chain)


def test_order_depends_on_seed_and_mix_and_nothing_else(stores: list[TokenStore]) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    first = stream(stores)
    torch.manual_seed(2)
    np.random.seed(2)
    assert same(first.next_step(), stream(stores).next_step())
    others = [stream(stores, seed=12), stream(stores, shares=[0.4, 0.4, 0.2]), stream(stores, packs_per_step=2)]
    for other in others:
        other.next_step()
    assert len({first.chain, *(other.chain for other in others)}) == 4


def test_the_chain_covers_what_was_consumed_and_in_which_pack(stores: list[TokenStore]) -> None:
    """Streams with equal arguments whose waiting lines differ, as a changed version could leave them."""
    packs, chains = [], []
    for swap in (False, True):
        steps = stream(stores)
        steps.next_sample_ids()
        if swap:
            steps._waiting.reverse()
        packs.append(steps.next_sample_ids())
        chains.append(steps.chain)
        if swap:
            with pytest.raises(ValueError, match=r"the chain of the first 2 steps is .* other samples"):
                stream(stores).verify(steps.state())
    assert packs[0] != packs[1] and chains[0] != chains[1]


def test_epochs_are_permuted_anew(stores: list[TokenStore]) -> None:
    steps = BatchStream(stores[:1], [1.0], budget=BUDGET, packs_per_step=1, seed=0)
    order = [index for _ in range(200) for pack in steps.next_sample_ids() for _, index in pack]
    size = len(stores[0])
    first, second = order[:size], order[size : 2 * size]
    assert first != sorted(first) and first != second


def test_restore_refuses_another_order(stores: list[TokenStore]) -> None:
    steps = stream(stores)
    for _ in range(5):
        steps.next_sample_ids()
    state = steps.state()
    for change, message in (
        ({"seed": 12}, r"seed was 11, is 12; the samples would come in another order"),
        ({"shares": [0.4, 0.4, 0.2]}, r"shares was \[0.5, 0.3, 0.2\], is \[0.4, 0.4, 0.2\]"),
        ({"budget": 128}, r"budget was 96, is 128"),
        ({"share_of": "loss_tokens"}, r"share_of was tokens, is loss_tokens"),
    ):
        with pytest.raises(ValueError, match="stream state: " + message):
            stream(stores, **change).restore(state)
    with pytest.raises(ValueError, match="stream state: stores was"):
        stream([stores[0], stores[2], stores[1]]).restore(state)
    edited = json.loads(json.dumps(state))
    edited["waiting"][0], edited["waiting"][1] = edited["waiting"][1], edited["waiting"][0]
    with pytest.raises(ValueError, match="the checksum does not fit"):
        stream(stores).restore(edited)
    with pytest.raises(ValueError, match="version 0, expected 1"):
        stream(stores).restore({**state, "version": 0})


def test_verify_detects_another_order(stores: list[TokenStore]) -> None:
    steps = stream(stores)
    for _ in range(5):
        steps.next_sample_ids()
    state = steps.state()
    steps.verify(state)
    with pytest.raises(ValueError, match=r"the chain of the first 5 steps is .* other samples"):
        stream(stores, seed=12).verify(state)


def test_a_sample_longer_than_the_pack(stores: list[TokenStore]) -> None:
    with pytest.raises(
        DataError, match=r"chat\.jsonl:\d+: the sample has \d+ tokens, expected at most .* budget of 40"
    ):
        stream(stores, budget=40)
    with pytest.raises(DataError, match=r"budget of 40"):
        next(iterate_packs(stores[0], 40))


def test_stream_argument_errors(stores: list[TokenStore]) -> None:
    for change, message in (
        ({"shares": [0.5, 0.5]}, "shares: got 2 for 3 stores"),
        ({"shares": [0.5, 0.5, 0.5]}, "shares: sum is 1.5"),
        ({"share_of": "rows"}, "share_of: got 'rows'"),
        ({"packs_per_step": 0}, "packs_per_step: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            stream(stores, **change)


def test_evaluation_sees_every_sample_once(stores: list[TokenStore]) -> None:
    for store in stores:
        packs = list(iterate_packs(store, 200))
        for pack in packs:
            check_pack(pack, [store], 200)
        assert sorted(sample for pack in packs for sample in pack.sample_ids) == [(0, i) for i in range(len(store))]
        assert sum(pack.loss_tokens for pack in packs) == store.loss_token_counts.sum()
        assert same(packs, list(iterate_packs(store, 200)))
