"""The data plane against its definitions: packs, shares, permutations and attention tiles."""

import threading
import time
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_core.kernels import PackPlan, TokenMixer, pack_sequences
from forge_core.kernels.pack import pack_step, random_permutation

BUDGETS = st.sampled_from([1, 7, 64, 100, 4097])


@st.composite
def lengths_and_budget(draw: st.DrawFn, max_size: int = 60) -> tuple[list[int], int]:
    budget = draw(BUDGETS)
    return draw(st.lists(st.integers(0, budget), max_size=max_size)), budget


def best_fit_rooms(lengths: list[int], budget: int) -> list[int]:
    """Best-fit decreasing as the books define it; returns the room left in each pack, sorted."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(budget - length)
    return sorted(rooms)


def pack_lists(order: np.ndarray, offsets: np.ndarray) -> list[list[int]]:
    return [order[a:b].tolist() for a, b in pairwise(offsets.tolist())]


@settings(max_examples=200, deadline=None)
@given(lengths_and_budget())
def test_packs_equal_brute_force_best_fit(case: tuple[list[int], int]) -> None:
    lengths, budget = case
    order, offsets = pack_sequences(lengths, budget)
    assert order.dtype == offsets.dtype == np.int64
    assert sorted(order.tolist()) == list(range(len(lengths)))
    packs = pack_lists(order, offsets)
    assert all(packs)
    assert sorted(budget - sum(lengths[i] for i in pack) for pack in packs) == best_fit_rooms(lengths, budget)


@pytest.mark.parametrize("budget", [8192, 300_000])  # both ways of sorting; bitmaps of three and of four levels
def test_packs_of_many_lengths(budget: int) -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1.2, 5000), 1, budget).astype(np.int64)
    order, offsets = pack_sequences(lengths, budget)
    rooms = sorted(budget - int(lengths[pack].sum()) for pack in pack_lists(order, offsets))
    assert sorted(order.tolist()) == list(range(lengths.size))
    assert rooms == best_fit_rooms(lengths.tolist(), budget)


def test_pack_errors_name_the_sequence() -> None:
    with pytest.raises(ValueError, match=r"lengths\[2\]: got 65 tokens, expected 0 to budget = 64"):
        pack_sequences([1, 64, 65], 64)
    with pytest.raises(ValueError, match=r"lengths\[1\]: got -3"):
        pack_sequences(np.array([1, -3]), 64)
    with pytest.raises(ValueError, match="budget: got 0"):
        pack_sequences([], 0)
    with pytest.raises(TypeError, match="lengths: got float64"):
        pack_sequences([1.5, 2.5], 64)
    with pytest.raises(TypeError, match=r"lengths: got int64 \[1, 2\]"):
        pack_sequences([[1, 2]], 64)


def test_packing_lets_other_threads_run() -> None:
    lengths = np.random.default_rng(0).integers(1, 8192, 2_000_000)
    ticks = []
    done = threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    pack_sequences(lengths, 8192)
    end = time.perf_counter()
    done.set()
    thread.join()
    assert sum(start < at < end for at in ticks) >= 3


@settings(max_examples=200, deadline=None)
@given(lengths_and_budget(), st.integers(1, 6))
def test_a_step_takes_the_oldest_and_fills_gaps(case: tuple[list[int], int], max_packs: int) -> None:
    lengths, budget = case
    order, offsets = pack_step(lengths, budget, max_packs)
    packs = pack_lists(order, offsets)
    taken = set(order.tolist())
    assert len(taken) == order.size and len(packs) <= max_packs
    assert all(sum(lengths[i] for i in pack) <= budget for pack in packs)
    waiting = [i for i in range(len(lengths)) if i not in taken]
    if waiting:
        assert len(packs) == max_packs
        assert set(range(min(max_packs, len(lengths)))) <= taken
        # What waits fits no gap that is left.
        assert min(lengths[i] for i in waiting) > max(budget - sum(lengths[i] for i in pack) for pack in packs)


@st.composite
def mixing_case(draw: st.DrawFn) -> tuple[list[int], list[list[int]]]:
    sources = draw(st.integers(1, 8))
    weights = draw(st.lists(st.integers(1, 100), min_size=sources, max_size=sources))
    length = st.sampled_from([1, 2, 30, 99, 100])
    return weights, [draw(st.lists(length, min_size=1, max_size=40)) for _ in weights]


@settings(max_examples=300, deadline=None)
@given(mixing_case())
def test_every_prefix_holds_the_shares(case: tuple[list[int], list[list[int]]]) -> None:
    weights, lengths = case
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    chosen = TokenMixer([float(share) for share in shares]).draw(lengths)
    position = [0] * len(weights)
    drawn = [0] * len(weights)
    longest = max(source[0] for source in lengths)
    for source in chosen.tolist():
        drawn[source] += lengths[source][position[source]]
        position[source] += 1
        if position[source] < len(lengths[source]):
            longest = max(longest, lengths[source][position[source]])
        gap = max(abs(tokens - share * sum(drawn)) for tokens, share in zip(drawn, shares, strict=True))
        assert gap <= longest + Fraction(1, 1_000_000)
    assert any(used == len(source) for used, source in zip(position, lengths, strict=True))  # why it stopped


def test_ten_unequal_sources_stay_within_one_sequence() -> None:
    """Taking the largest deficit strays by 1.7 sequences here."""
    shares = np.random.default_rng(25).random(10) ** 4
    shares /= shares.sum()
    chosen = TokenMixer(shares.tolist()).draw([np.ones(3000, np.int64)] * 10, max_draws=3000)
    drawn = np.cumsum(chosen[:, None] == np.arange(10), axis=0)
    target = np.arange(1, chosen.size + 1)[:, None] * shares
    assert np.abs(drawn - target).max() <= 1


@settings(max_examples=60, deadline=None)
@given(mixing_case(), st.data())
def test_mixer_goes_on_from_its_state(case: tuple[list[int], list[list[int]]], data: st.DataObject) -> None:
    weights, lengths = case
    shares = [weight / sum(weights) for weight in weights]
    whole = TokenMixer(shares, seed=5).draw(lengths)
    stop = data.draw(st.integers(0, whole.size))
    first, second = TokenMixer(shares, seed=5), TokenMixer(shares, seed=5)
    start = first.draw(lengths, max_draws=stop)
    second.restore(first.state())
    used = np.bincount(start, minlength=len(shares))
    rest = second.draw([source[count:] for source, count in zip(lengths, used, strict=True)])
    assert np.array_equal(np.concatenate([start, rest]), whole)


def test_mixer_limits_and_empty_share() -> None:
    mixer = TokenMixer([0.5, 0.0, 0.5])
    chosen = mixer.draw([[10] * 9, [10] * 9, [10] * 9], max_tokens=55)
    assert chosen.size == 6 and 1 not in chosen and mixer.drawn == [30, 0, 30]


def test_mixer_errors() -> None:
    with pytest.raises(ValueError, match=r"shares: sum is 0.9"):
        TokenMixer([0.5, 0.4])
    with pytest.raises(ValueError, match=r"shares\[1\]: got -0.5"):
        TokenMixer([1.5, -0.5])
    with pytest.raises(ValueError, match="shares: got no source"):
        TokenMixer([])
    mixer = TokenMixer([0.5, 0.5])
    with pytest.raises(ValueError, match=r"lengths\[1\]\[2\]: got 0 tokens"):
        mixer.draw([[1], [1, 1, 0]])
    with pytest.raises(ValueError, match="got 1 sources, expected 2"):
        mixer.draw([[1]])
    assert mixer.drawn == [0, 0]
    with pytest.raises(ValueError, match="shares is"):
        mixer.restore(TokenMixer([0.25, 0.75]).state())
    with pytest.raises(ValueError, match="seed is 1"):
        mixer.restore(TokenMixer([0.5, 0.5], seed=1).state())


def shuffle_by_definition(count: int, key: list[int]) -> list[int]:
    state = 0

    def splitmix64() -> int:
        nonlocal state
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    for part in key:
        state = splitmix64() ^ part
    order = list(range(count))
    for i in range(count - 1, 0, -1):
        product = splitmix64() * (i + 1)
        while product % 2**64 < 2**64 % (i + 1):
            product = splitmix64() * (i + 1)
        order[i], order[product >> 64] = order[product >> 64], order[i]
    return order


def test_permutation_is_a_function_of_its_key() -> None:
    assert random_permutation(500, [1, 2, 2**64 - 3]).tolist() == shuffle_by_definition(500, [1, 2, 2**64 - 3])
    assert sorted(random_permutation(1000, [2**64 - 1]).tolist()) == list(range(1000))
    assert random_permutation(0, [1]).size == 0
    assert not np.array_equal(random_permutation(100, [1, 0, 1]), random_permutation(100, [1, 1, 0]))
    positions = np.array([np.flatnonzero(random_permutation(5, [k]) == 0)[0] for k in range(5000)])
    assert np.abs(np.bincount(positions, minlength=5) - 1000).max() < 140  # five standard deviations


def visible(i: int, j: int, causal: bool, window: int | None) -> bool:
    if causal:
        return j <= i and (window is None or i - window < j)
    return window is None or abs(i - j) < window


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 40), max_size=4),
    st.sampled_from([1, 4, 16]),
    st.sampled_from([1, 5, 16]),
    st.booleans(),
    st.sampled_from([None, 1, 6, 100]),
)
def test_tiles_cover_each_visible_pair_once(
    documents: list[int], q_tile: int, kv_tile: int, causal: bool, window: int | None
) -> None:
    cu_seqlens = np.concatenate([[0], np.cumsum(documents)]).astype(np.int32)
    plan = PackPlan(cu_seqlens, q_tile=q_tile, kv_tile=kv_tile, causal=causal, window=window)
    tokens = int(cu_seqlens[-1])
    document = np.repeat(np.arange(len(documents)), documents)
    mask = np.array(
        [[document[i] == document[j] and visible(i, j, causal, window) for j in range(tokens)] for i in range(tokens)],
        dtype=bool,
    ).reshape(tokens, tokens)
    for tiles, seen in ((plan.forward, mask), (plan.backward, mask.T)):
        assert np.all(np.diff(tiles[:, 7]) <= 0)  # longest first
        covered = np.zeros_like(seen, dtype=int)
        for number, row_start, row_end, col_start, col_end, full_start, full_end, area in tiles.tolist():
            assert cu_seqlens[number] <= row_start < row_end <= cu_seqlens[number + 1]
            assert cu_seqlens[number] <= col_start < col_end <= cu_seqlens[number + 1]
            covered[row_start:row_end, col_start:col_end] += 1
            assert seen[row_start:row_end, full_start:full_end].all()
            assert col_start <= full_start <= full_end <= col_end
            assert seen[row_start:row_end].sum() == area
        assert np.all(covered[seen] == 1)
        assert covered.max(initial=0) <= 1
    assert plan.tokens == tokens and plan.max_seqlen == max(documents, default=0)


def test_interior_of_a_long_document_needs_no_mask() -> None:
    plan = PackPlan(np.array([0, 640], np.int32), q_tile=64, kv_tile=64)
    assert plan.forward[0].tolist() == [0, 576, 640, 0, 640, 0, 576, sum(range(577, 641))]


def test_plan_errors() -> None:
    with pytest.raises(TypeError, match=r"cu_seqlens: got int64 \[2\], expected int32"):
        PackPlan(np.array([0, 3]))
    for bad in ([], [1, 3], [0, 3, 2]):
        with pytest.raises(ValueError, match="expected 0 followed by the end"):
            PackPlan(np.array(bad, np.int32))
    with pytest.raises(ValueError, match="q_tile: got 0"):
        PackPlan(np.array([0, 3], np.int32), q_tile=0)
    with pytest.raises(ValueError, match="window: got 0"):
        PackPlan(np.array([0, 3], np.int32), window=0)
