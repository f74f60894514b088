from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest

from epi_ds.choices import Curve
from epi_ds.config import EPIConfig, RatioSchedule
from epi_ds.isolation.policy import Evolving, Static
from epi_ds.isolation.schedule import first_active_step, largest_ratio, planned_steps_of, ratio_at, too_short


def test_evolving_measures_always_and_refreshes_on_the_interval() -> None:
    policy = Evolving(3)
    assert all(policy.observes(step) for step in range(1, 10))
    assert [step for step in range(1, 10) if policy.refreshes(step)] == [3, 6, 9]


def test_static_does_neither() -> None:
    assert not any(Static().observes(step) or Static().refreshes(step) for step in range(1, 1000))


def refused(*args: int, **settings: Any) -> str:
    """The message of a run that is refused."""
    found = too_short(*args, **settings, allow_inactive=False)
    assert found is not None
    assert found.is_refused
    return found.message


def test_a_run_that_never_isolates_is_an_error() -> None:
    assert re.search(r"500 planned steps.*from step 501.*Set refresh_interval: 50", refused(500, 500))


def test_what_is_set_already_is_no_remedy() -> None:
    assert "isolated. Train for 2 steps at least, with refresh_interval: 1" in refused(1, 1)
    assert "isolated. Set warmup_steps: 1, or allow_inactive" in refused(9, 1, warmup_steps=9)


def test_the_setting_that_decides_is_named() -> None:
    message = refused(30, 50, setting="check_interval")
    assert re.search(r"from step 51 \(check_interval 50.*Set check_interval: 3", message)


def test_a_run_that_rarely_isolates_is_told() -> None:
    rarely = too_short(999, 500, allow_inactive=False)
    accepted = too_short(100, 500, allow_inactive=True)
    assert rarely is not None
    assert accepted is not None
    assert (rarely.is_refused, accepted.is_refused) == (False, False)
    assert "refresh_interval: 99 would refresh ten times" in rarely.message
    assert "allow_inactive is true" in accepted.message


def test_of_a_long_run_there_is_nothing_to_say() -> None:
    assert too_short(1000, 500, allow_inactive=False) is None


@pytest.mark.parametrize(
    ("settings", "begins_with_mask", "is_refused"),
    [
        ({"refresh_interval": 100}, False, True),
        ({"refresh_interval": 100}, True, None),
        ({"refresh_interval": 100, "ratio": 0}, False, None),
        ({"refresh_interval": 4}, False, None),
        ({"refresh_interval": "adaptive", "check_interval": 100}, False, True),
        ({"policy": "none"}, False, None),
        ({"policy": "random", "warmup_steps": 20, "redraw": "never"}, False, True),
        ({"policy": "random"}, False, None),
    ],
)
def test_what_decides_is_the_policy(settings: dict[str, Any], begins_with_mask: bool, is_refused: bool | None) -> None:
    found = planned_steps_of(EPIConfig(**settings), 10, begins_with_mask=begins_with_mask)
    assert (None if found is None else found.is_refused) == is_refused


def test_no_mask_is_selected_before_the_warm_up_ends() -> None:
    policy = Evolving(3, warmup_steps=7)
    assert all(policy.observes(step) for step in range(1, 10))
    assert [step for step in range(1, 16) if policy.refreshes(step)] == [9, 12, 15]
    assert first_active_step(3, warmup_steps=7) == 10
    assert first_active_step(3, warmup_steps=9) == 10
    assert first_active_step(3) == first_active_step(3, warmup_steps=2) == 4
    message = refused(9, 3, warmup_steps=7)
    assert re.search(r"9 planned steps.*from step 10.*warmup_steps 7.*Set refresh_interval: 1, warm", message)


@pytest.mark.parametrize("curve", list(Curve))
def test_a_scheduled_ratio_goes_from_start_to_end(curve: Curve) -> None:
    schedule = RatioSchedule(schedule=curve, start=0.2, end=0.05, steps=100)
    ratios = [ratio_at(schedule, step, warmup_steps=50) for step in range(300)]
    assert ratios[:51] == [0.2] * 51
    assert ratios[150:] == [0.05] * 150
    assert all(later < earlier for earlier, later in pairwise(ratios[50:150]))
    assert ratios[100] == 0.125
    # A quarter of the way: a straight line has gone a quarter, half a cosine wave less.
    assert ratios[75] == pytest.approx(0.1625 if curve is Curve.LINEAR else 0.2 - 0.15 * (1 - 0.5**0.5) / 2)
    assert largest_ratio(EPIConfig(ratio=schedule)) == 0.2
    assert ratio_at(0.3, 7) == largest_ratio(EPIConfig(ratio=0.3)) == 0.3
    assert largest_ratio(EPIConfig(ratio="adaptive", max_ratio=0.1)) == 0.1
