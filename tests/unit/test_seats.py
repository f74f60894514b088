"""Engines of one process that share a folder have a number each, and a number is free again when its engine is gone."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from epi_ds.checkpoint import seats
from epi_ds.checkpoint.seats import free_number, leave_seats, take_seat

FOLDER, OTHER = Path("/runs/one"), Path("/runs/other")


class Engine:
    """What has a number."""


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seats, "_seats", {})


def seated(folder: Path, *, wanted: int | None = None, there: tuple[int, ...] = ()) -> tuple[Engine, int]:
    engine = Engine()
    number = free_number(folder, engine, wanted=wanted, there=there)
    take_seat(folder, engine, number)
    return engine, number


def test_each_engine_has_a_number_of_its_own_in_every_folder() -> None:
    actor, first = seated(FOLDER)
    critic, second = seated(FOLDER)
    _, elsewhere = seated(OTHER)
    assert (first, second, elsewhere) == (0, 1, 0)
    # Asked again, both have what they had, whatever lies in the folder meanwhile.
    assert free_number(FOLDER, actor, wanted=1, there=(0, 1)) == 0
    assert free_number(FOLDER, critic, wanted=None, there=()) == 1


def test_an_engine_goes_on_under_the_number_of_its_tag() -> None:
    critic, number = seated(FOLDER, wanted=1, there=(0, 1))
    assert number == 1
    # Where another engine has it, the one that loads gets a free one.
    assert free_number(FOLDER, Engine(), wanted=1, there=(0, 1)) == 2
    leave_seats(critic)
    assert free_number(FOLDER, Engine(), wanted=1, there=(0, 1)) == 1


@pytest.mark.parametrize(("there", "expected"), [((), 0), ((0,), 0), ((3,), 0), ((0, 1), 2), ((0, 2), 1), ((1, 2), 0)])
def test_one_that_begins_anew_leaves_the_numbers_of_several_alone(there: tuple[int, ...], expected: int) -> None:
    """One engine's tags are gone on with, or replaced; of several, one may be loaded later."""
    assert free_number(FOLDER, Engine(), wanted=None, there=there) == expected


def test_a_number_is_free_when_its_engine_left_or_is_gone() -> None:
    actor, _ = seated(FOLDER)
    take_seat(OTHER, actor, 4)
    critic, _ = seated(FOLDER)
    leave_seats(actor)
    assert free_number(FOLDER, Engine(), wanted=None, there=()) == 0
    assert free_number(OTHER, Engine(), wanted=4, there=()) == 4
    assert free_number(FOLDER, critic, wanted=None, there=()) == 1
    del critic
    gc.collect()
    assert free_number(FOLDER, Engine(), wanted=1, there=()) == 1


def test_leaving_without_a_seat_changes_nothing() -> None:
    actor, _ = seated(FOLDER)
    leave_seats(Engine())
    assert free_number(FOLDER, actor, wanted=None, there=()) == 0
