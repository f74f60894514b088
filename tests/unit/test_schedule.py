from __future__ import annotations

import logging
from itertools import pairwise

import pytest

from epi_ds.choices import Curve
from epi_ds.config import EPIConfig, RatioSchedule
from epi_ds.isolation.policy import Evolving, Static
from epi_ds.isolation.schedule import check_planned_steps, first_active_step, largest_ratio, ratio_at


def test_evolving_measures_always_and_refreshes_on_the_interval() -> None:
    policy = Evolving(3)
    assert all(policy.observes(step) for step in range(1, 10))
    assert [step for step in range(1, 10) if policy.refreshes(step)] == [3, 6, 9]


def test_static_does_neither() -> None:
    assert not any(Static().observes(step) or Static().refreshes(step) for step in range(1, 1000))


def test_a_run_that_never_isolates_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"500 planned steps.*from step 501.*Set refresh_interval: 50"):
        check_planned_steps(500, 500, allow_inactive=False)


def test_what_is_set_already_is_no_remedy() -> None:
    with pytest.raises(ValueError, match=r"isolated\. Train for 2 steps at least, with refresh_interval: 1"):
        check_planned_steps(1, 1, allow_inactive=False)
    with pytest.raises(ValueError, match=r"isolated\. Set warmup_steps: 1, or allow_inactive"):
        check_planned_steps(9, 1, warmup_steps=9, allow_inactive=False)


def test_the_setting_that_decides_is_named() -> None:
    with pytest.raises(ValueError, match=r"from step 51 \(check_interval 50.*Set check_interval: 3"):
        check_planned_steps(30, 50, setting="check_interval", allow_inactive=False)


def test_a_run_that_rarely_isolates_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_planned_steps(999, 500, allow_inactive=False)
        check_planned_steps(100, 500, allow_inactive=True)
    assert "refresh_interval: 99 would refresh ten times" in caplog.text
    assert "allow_inactive is true" in caplog.text


def test_a_long_run_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    check_planned_steps(1000, 500, allow_inactive=False)
    assert not caplog.records


def test_no_mask_is_selected_before_the_warm_up_ends() -> None:
    policy = Evolving(3, warmup_steps=7)
    assert all(policy.observes(step) for step in range(1, 10))
    assert [step for step in range(1, 16) if policy.refreshes(step)] == [9, 12, 15]
    assert first_active_step(3, warmup_steps=7) == 10
    assert first_active_step(3, warmup_steps=9) == 10
    assert first_active_step(3) == first_active_step(3, warmup_steps=2) == 4
    with pytest.raises(
        ValueError, match=r"9 planned steps.*from step 10.*warmup_steps 7.*Set refresh_interval: 1, warm"
    ):
        check_planned_steps(9, 3, warmup_steps=7, allow_inactive=False)


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
