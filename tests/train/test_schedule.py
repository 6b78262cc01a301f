"""The learning rate at the corners of the schedule and between them."""

import math

import pytest

from forge_core.train import Schedule


def test_warmup_plateau_and_linear_decay() -> None:
    schedule = Schedule(peak=1.0, minimum=0.2, warmup=4, constant=3, total=15, decay="linear")
    rates = [schedule(step) for step in range(1, 17)]
    assert rates[:7] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    assert rates[7:15] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    assert rates[15] == pytest.approx(0.2)


def test_cosine_decay_passes_the_middle_and_ends_at_the_minimum() -> None:
    schedule = Schedule(peak=1e-4, minimum=1e-6, warmup=10, constant=0, total=110, decay="cosine")
    assert schedule(10) == 1e-4
    assert schedule(60) == pytest.approx((1e-4 + 1e-6) / 2)
    assert schedule(35) == pytest.approx(1e-6 + (1e-4 - 1e-6) * (1 + math.cos(math.pi / 4)) / 2)
    assert schedule(110) == pytest.approx(1e-6)
    rates = [schedule(step) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(("warmup", "constant"), [(5, 0), (0, 5), (2, 3)])
def test_no_room_for_a_decay(warmup: int, constant: int) -> None:
    schedule = Schedule(peak=1.0, minimum=0.0, warmup=warmup, constant=constant, total=5, decay="cosine")
    assert schedule(5) == 1.0
    assert schedule(6) == 0.0


def test_no_warmup_starts_below_the_peak_on_its_way_down() -> None:
    schedule = Schedule(peak=1.0, minimum=0.0, warmup=0, constant=0, total=4, decay="linear")
    assert [schedule(step) for step in (1, 2, 3, 4)] == [0.75, 0.5, 0.25, 0.0]


def test_steps_are_counted_from_one() -> None:
    with pytest.raises(ValueError, match="counted from 1"):
        Schedule(1.0, 0.0, 0, 0, 1, "linear")(0)
