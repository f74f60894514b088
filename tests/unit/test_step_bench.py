"""The arithmetic of the step benchmark: whose time is whose, and the interval of a ratio."""

from __future__ import annotations

import random
import time
from contextlib import suppress

from epi_ds.bench.step import bootstrap_ratio
from epi_ds.bench.step_clock import Owner, StepClock

OURS, STEP, NORM = Owner(True, "step"), Owner(False, "step"), Owner(False, "norm")


def test_time_belongs_to_the_innermost_method() -> None:
    clock = StepClock()
    norm = clock.timed(lambda: time.sleep(0.02), NORM)

    def override() -> None:
        time.sleep(0.01)
        norm()
        time.sleep(0.01)

    ours = clock.timed(override, OURS)

    def step() -> None:
        time.sleep(0.04)
        ours()

    clock.timed(step, STEP)()
    taken = clock.take()
    assert set(taken) == {STEP, NORM, OURS}
    # A sleep lasts at least as long as asked for; a busy machine makes it longer.
    assert taken[STEP] >= 0.04
    assert taken[NORM] >= 0.02
    assert taken[OURS] >= 0.02
    assert clock.take() == {}


def test_a_method_that_raises_leaves_the_clock_right() -> None:
    clock = StepClock()

    def fail() -> None:
        raise KeyError

    for _ in range(2):
        with suppress(KeyError):
            clock.timed(fail, STEP)()
    clock.timed(lambda: None, OURS)()
    assert set(clock.take()) == {STEP, OURS}


def test_the_interval_holds_the_ratio_and_narrows_with_pairs() -> None:
    generator = random.Random(1)
    widths = []
    for pairs in (20, 500):
        theirs = [generator.gauss(100, 5) for _ in range(pairs)]
        ours = [generator.gauss(103, 5) for _ in range(pairs)]
        ratio, low, high = bootstrap_ratio(ours, theirs, random.Random(0).choices)
        assert low <= ratio <= high
        widths.append(high - low)
    # Medians of 500 are within 0.3 % of the truth each, and the numbers are always the same.
    assert abs(ratio - 1.03) < 0.01
    assert low > 1.01
    assert widths[1] < widths[0] / 2


def test_equal_steps_have_a_ratio_of_one() -> None:
    assert bootstrap_ratio([2.0] * 9, [2.0] * 9, random.Random(0).choices) == (1.0, 1.0, 1.0)
