"""What an engine tells of its own speed, by a clock that the test moves."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from splitserve.engine.pace import BatchTimes


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def line_of(batches: Sequence[tuple[int, float]]) -> tuple[float, float]:
    clock = Clock()
    times = BatchTimes(clock)
    for tokens, seconds in batches:
        clock.now += 1.0  # at rest
        began = clock.now
        clock.now += seconds
        times.ended(tokens, began)
    return times.line


def test_nothing_is_known_before_a_second_batch_of_a_size() -> None:
    """The first one may have had a kernel to compile."""
    assert line_of([]) == (0.0, 0.0)
    assert line_of([(20, 1.0), (2000, 1.0)]) == (0.0, 0.0)
    assert line_of([(20, 1.0), (2000, 1.0), (20, 0.01)]) == pytest.approx((0.01, 0.0))


def test_while_all_have_one_size_tokens_cost_nothing() -> None:
    """Twenty tokens in 10 ms are no 2,000 tokens a second: a large prompt would count as late, and never be tried."""
    assert line_of([(20, 0.010)] * 5) == pytest.approx((0.010, 0.0))


@pytest.mark.parametrize("seed", range(20))
def test_a_line_is_found_through_its_noise(seed: int) -> None:
    dice = random.Random(seed)
    sizes = [dice.choice([1, 16, 60, 300, 1000, 2048]) for _ in range(200)]
    batch_s, token_s = line_of([(size, (0.01 + size * 1e-5) * dice.uniform(0.9, 1.1)) for size in sizes])
    assert batch_s == pytest.approx(0.01, rel=0.15)
    assert token_s == pytest.approx(1e-5, rel=0.15)


def test_a_large_batch_is_not_forgotten_among_small_ones() -> None:
    batch_s, token_s = line_of([(2048, 0.03), (2048, 0.03), *[(10, 0.01)] * 1000])
    assert batch_s + 2048 * token_s == pytest.approx(0.03)


def test_neither_part_is_negative() -> None:
    batch_s, token_s = line_of([(20, 1.0), (2000, 0.02)] * 2)  # something else has held up the small ones
    assert batch_s == pytest.approx(0.51)
    assert token_s == 0.0
    batch_s, token_s = line_of([(100, 0.001), (200, 0.1)] * 2)
    assert batch_s == 0.0
    assert 1e-4 < token_s < 1e-3


def test_batches_that_overlap_take_their_own_time() -> None:
    clock = Clock()
    times = BatchTimes(clock)
    began = clock.now
    for _ in range(3):  # launched at once, run one after another
        clock.now += 0.02
        times.ended(512, began)
    assert times.line == pytest.approx((0.02, 0.0))
    clock.now += 4.0
    assert times.rested_s == pytest.approx(4.0)
