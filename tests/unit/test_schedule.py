from __future__ import annotations

import logging

import pytest

from epi_ds.isolation.policy import Evolving, Static
from epi_ds.isolation.schedule import check_planned_steps


def test_evolving_measures_always_and_refreshes_on_the_interval() -> None:
    policy = Evolving(3)
    assert all(policy.observes(step) for step in range(1, 10))
    assert [step for step in range(1, 10) if policy.refreshes(step)] == [3, 6, 9]


def test_static_does_neither() -> None:
    assert not any(Static().observes(step) or Static().refreshes(step) for step in range(1, 1000))


def test_a_run_that_never_isolates_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"500 planned steps.*from step 501.*Set refresh_interval to 50"):
        check_planned_steps(500, 500, allow_inactive=False)


def test_a_run_that_rarely_isolates_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_planned_steps(999, 500, allow_inactive=False)
        check_planned_steps(100, 500, allow_inactive=True)
    assert "refresh_interval: 99 would refresh ten times" in caplog.text
    assert "allow_inactive is true" in caplog.text


def test_a_long_run_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    check_planned_steps(1000, 500, allow_inactive=False)
    assert not caplog.records
