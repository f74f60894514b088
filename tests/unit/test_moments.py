"""Adam's moments at isolation and release, and the windows that gradients come from."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from epi_ds.isolation.importance.views import ReadPartition
from epi_ds.kernels import pack_bits
from epi_ds.zero3.moments import ClippingAverage, clipping_factor, reset_moments, set_moments, state_age
from epi_ds.zero3.window import AccumulationWindow


def bits_of(mask: list[bool]) -> torch.Tensor:
    bits = torch.empty(-(-len(mask) // 8), dtype=torch.uint8)
    pack_bits(torch.tensor(mask), bits)
    return bits


def reader(importance: list[float]) -> ReadPartition:
    return lambda start, stop: torch.tensor(importance)[start:stop]


def test_moments_of_entries_that_change_are_set_and_of_others_are_not() -> None:
    #            stays free, stays isolated, isolated now, released now
    before, now = [False, True, False, True], [False, True, True, False]
    state = {"step": 7, "exp_avg": torch.tensor([1.0, 2, 3, 4]), "exp_avg_sq": torch.tensor([5.0, 6, 7, 8])}
    importance = reader([10.0, 20, 30, 40])
    set_moments(state, before=bits_of(before), now=bits_of(now), importance=importance, importance_scale=0.5)
    assert state["exp_avg"].tolist() == [1, 2, 0, 0]
    assert state["exp_avg_sq"].tolist() == [5, 6, 7, 20]
    set_moments({}, before=bits_of(before), now=bits_of(now), importance=importance, importance_scale=0.5)


def test_a_pull_in_the_gradient_is_in_the_second_moment_of_what_is_released() -> None:
    before, now = bits_of([False, True, False, True]), bits_of([False, True, True, False])
    state = {"exp_avg": torch.ones(4), "exp_avg_sq": torch.full((4,), 5.0)}
    pull = torch.tensor([1.0, 2, 3, -4])
    set_moments(state, before=before, now=now, importance=reader([2.0] * 4), importance_scale=0.5, pull=pull)
    assert state["exp_avg_sq"].tolist() == [5, 5, 5, 1 + 16]


def test_a_pull_is_added_to_a_second_moment_that_tracked_the_rest() -> None:
    state = {"exp_avg": torch.ones(2), "exp_avg_sq": torch.full((2,), 5.0)}
    before, now, pull = bits_of([True, True]), bits_of([False, True]), torch.tensor([-3.0, 2])
    set_moments(state, before=before, now=now, importance=None, importance_scale=0.0, pull=pull)
    assert state["exp_avg_sq"].tolist() == [5 + 9, 5]


def test_without_importance_the_second_moment_stays() -> None:
    state = {"exp_avg": torch.ones(1), "exp_avg_sq": torch.full((1,), 3.0)}
    set_moments(state, before=bits_of([True]), now=bits_of([False]), importance=None, importance_scale=0.0)
    assert state["exp_avg"].tolist() == [0]
    assert state["exp_avg_sq"].tolist() == [3]


def test_a_rebuilt_second_moment_is_finite() -> None:
    state = {"exp_avg": torch.ones(1), "exp_avg_sq": torch.ones(1)}
    largest = torch.finfo(torch.float32).max
    set_moments(
        state,
        before=bits_of([True]),
        now=bits_of([False]),
        importance=reader([largest]),
        importance_scale=9.0,
    )
    assert state["exp_avg_sq"].tolist() == [largest]


def test_a_steady_gradient_rebuilds_adams_own_second_moment() -> None:
    """With the same gradient in every step, S and Adam's moment differ by their start at zero only."""
    gradient, factor, beta2, decay, steps = 3.0, 0.25, 0.999, 0.9, 40
    clipping = ClippingAverage(beta2)
    second, importance = 0.0, 0.0
    for _ in range(steps):
        clipping.observe(factor)
        second = beta2 * second + (1 - beta2) * (factor * gradient) ** 2
        importance = decay * importance + (1 - decay) * gradient**2
    scale = clipping.corrected * (1 - beta2**steps) / (1 - decay**steps)
    assert importance * scale == pytest.approx(second, rel=1e-12)


def test_clipping_average_starts_unbiased_saves_and_resets() -> None:
    average = ClippingAverage(0.99)
    assert average.corrected == 1.0
    average.observe(0.5)
    assert average.corrected == pytest.approx(0.25)
    average.observe(0.3)
    copy = ClippingAverage(0.99)
    copy.restore(average.to_dict())
    assert copy.corrected == average.corrected
    average.reset()
    assert average.corrected == 1.0


@pytest.mark.parametrize(
    ("norm", "max_norm", "factor"), [(0.5, 1.0, 1.0), (4.0, 1.0, 0.25), (4.0, 0.0, 1.0), (0.0, 1.0, 1.0)]
)
def test_clipping_factor(norm: float, max_norm: float, factor: float) -> None:
    assert clipping_factor(norm, max_norm) == pytest.approx(factor, rel=1e-5)


def test_reset_returns_a_state_to_age_zero() -> None:
    for step in (5, torch.tensor(5.0)):
        state = {"step": step, "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
        assert state_age(state) == 5
        reset_moments(state)
        assert state_age(state) == 0
        assert not state["exp_avg"].any()
        assert not state["exp_avg_sq"].any()


def test_a_window_knows_what_was_reduced_in_it_and_what_came_late() -> None:
    early, late, unused = (SimpleNamespace(ds_id=i) for i in range(3))
    window = AccumulationWindow()
    window.record(early, torch.ones(2), buffer_is_stale=False, is_copied_out=False)
    window.record(early, torch.ones(2), buffer_is_stale=True, is_copied_out=False)
    partition = torch.ones(2, dtype=torch.bfloat16)
    window.record(late, partition, buffer_is_stale=True, is_copied_out=False)
    partition.zero_()  # the bucket that the partition is a view of is reused
    window.record(late, torch.full((2,), 2.0), buffer_is_stale=True, is_copied_out=False)
    window.close()
    assert window.was_reduced(early)
    assert window.own_gradient(early) is None
    assert window.was_reduced(late)
    own = window.own_gradient(late)
    assert own is not None
    assert own.tolist() == [3, 3]
    assert not window.was_reduced(unused)
    window.record(unused, torch.ones(1), buffer_is_stale=False, is_copied_out=False)
    assert not window.was_reduced(unused)
    window.discard()
    window.close()
    assert not window.was_reduced(unused)
    assert not window.was_reduced(early)


def test_a_window_knows_whose_buffers_it_did_not_overwrite() -> None:
    every, late, early, once = (SimpleNamespace(ds_id=i) for i in range(4))

    def run_window(window: AccumulationWindow, *, with_once: bool, boundary: bool) -> list[bool]:
        """Two micro-batches; ``early`` is in the first, ``late`` in the second, ``boundary``: with offload."""
        for parameter in (every, early, once)[: 2 + with_once]:
            window.record(parameter, torch.ones(1), buffer_is_stale=False, is_copied_out=False)
        for parameter in (every, late, once)[: 2 + with_once]:
            window.record(parameter, torch.ones(1), buffer_is_stale=True, is_copied_out=boundary)
        window.close()
        return [window.has_leftover(parameter) for parameter in (every, late, early, once)]

    for boundary in (False, True):
        window = AccumulationWindow()
        assert not window.has_leftover(every)
        assert run_window(window, with_once=True, boundary=boundary) == [False, True, False, False]
        assert run_window(window, with_once=False, boundary=boundary) == [False, True, False, True]
        # A window that overwrites it again does not promise that the next one will.
        assert run_window(window, with_once=True, boundary=boundary) == [False, True, False, True]
    # The first micro-batch alone uses it now, but the optimizer has kept what it got at an earlier boundary.
    window = AccumulationWindow()
    window.record(early, torch.ones(1), buffer_is_stale=False, is_copied_out=True)
    window.close()
    assert run_window(window, with_once=False, boundary=True) == [False, True, True, False]
