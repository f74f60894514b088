"""The rows that are replayed: how many of every global batch, which, and what they leave of the stages' own order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from decimal import ROUND_FLOOR, Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epi_ds.errors import UserError
from epi_ds.recipe.loading import parse_recipe
from epi_ds.recipe.models import Recipe
from epi_ds.train.replay import Replay, exact_share, replayed_rows, steps_of
from epi_ds.train.stages import StageRows, StageSpan, plan_stages, row_order
from epi_ds.train.streams import SourceShare, TableRows

SHARES = st.sampled_from([0.0, 0.001, 0.05, 0.1, 0.29, 1 / 3, 0.5, 0.9])
SIZES = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 3)), min_size=1, max_size=4)


def plan(
    sizes: Sequence[tuple[int, int]], share: Fraction, batch: int
) -> tuple[list[StageRows], list[StageSpan]] | None:
    """Stages of so many rows and epochs, and their spans; None where one fills no batch."""
    stages = [StageRows(str(index), rows, epochs) for index, (rows, epochs) in enumerate(sizes)]
    try:
        return stages, plan_stages(stages, global_batch=batch, replayed_share=share)
    except UserError:
        return None


@given(share=SHARES, step=st.integers(0, 10_000), batch=st.integers(1, 64))
def test_a_batch_has_its_share_rounded_down_over_time(share: float, step: int, batch: int) -> None:
    def before(number: int) -> int:
        return int((number * batch * Decimal(repr(share))).to_integral_value(ROUND_FLOOR))

    assert replayed_rows(exact_share(share), step, global_batch=batch) == before(step + 1) - before(step)


def test_a_share_is_the_one_that_was_written() -> None:
    # In binary 0.29 x 100 is 28.999999999999996, and the first batch would have 28.
    assert int(0.29 * 100) == 28
    assert replayed_rows(exact_share(0.29), 0, global_batch=100) == 29
    assert exact_share(1e-05) == Fraction(1, 100_000)


@given(share=SHARES, rows=st.integers(0, 200), first_step=st.integers(0, 50), batch=st.integers(1, 12))
def test_a_stage_has_as_many_steps_as_its_rows_fill(share: float, rows: int, first_step: int, batch: int) -> None:
    exact, left, steps, last = exact_share(share), rows, 0, 0
    while True:
        new = batch - replayed_rows(exact, first_step + steps, global_batch=batch)
        if new > left:
            break
        steps, left = steps + 1, left - new
        # Batches that are replayed alone do not count where none with new rows follows.
        last = steps if new else last
    assert steps_of(rows, share=exact, first_step=first_step, global_batch=batch) == last
    if share == 0:
        assert last == rows // batch


@given(sizes=SIZES, share=SHARES, kept=st.integers(1, 9), batch=st.integers(1, 10), stages_too=st.booleans())
def test_every_new_row_is_trained_once_an_epoch_and_in_the_order_without_replay(
    sizes: list[tuple[int, int]], share: float, kept: int, batch: int, stages_too: bool
) -> None:
    exact = exact_share(share)
    if (planned := plan(sizes, exact, batch)) is None:
        return
    stages, spans = planned
    total = sum(stage.num_rows for stage in stages)
    replay = Replay(exact, TableRows(kept), stages_too)
    order = row_order(stages, spans, global_batch=batch, seed=3, replay=replay)
    assert order == row_order(stages, spans, global_batch=batch, seed=3, replay=replay)
    assert len(order) == spans[-1].stop_step * batch
    offset = 0
    for number, (stage, span) in enumerate(zip(stages, spans, strict=True)):
        batches = [order[step * batch : (step + 1) * batch] for step in range(span.first_step, span.stop_step)]
        for step, rows in enumerate(batches, span.first_step):
            # The replayed ones are the last of their batch.
            count = replayed_rows(exact, step, global_batch=batch)
            assert [row >= total for row in rows] == [False] * (batch - count) + [True] * count
        new = [row for rows in batches for row in rows if row < total]
        alone = StageSpan(stage.name, 0, len(new))
        others = [StageSpan(other.name, 0, 0) for other in stages]
        spans_alone = [*others[:number], alone, *others[number + 1 :]]
        assert new == row_order(stages, spans_alone, global_batch=1, seed=3)
        for first in range(0, len(new), stage.num_rows):
            epoch = new[first : first + stage.num_rows]
            assert len(set(epoch)) == len(epoch)
            assert set(epoch) <= set(range(offset, offset + stage.num_rows))
        # What is left over does not fill the next batch that has rows of its own.
        assert 0 <= stage.num_rows * stage.epochs - len(new) < batch
        offset += stage.num_rows


@given(share=SHARES, kept=st.integers(1, 9), batch=st.integers(1, 10), steps=st.integers(1, 30))
def test_what_is_kept_and_each_finished_stage_have_equal_parts(share: float, kept: int, batch: int, steps: int) -> None:
    stages = [StageRows("a", 7, 1, steps=steps), StageRows("b", 3, 1, steps=steps), StageRows("c", 5, 1, steps=steps)]
    exact, total = exact_share(share), 15
    spans = plan_stages(stages, global_batch=batch, replayed_share=exact)
    replay = Replay(exact, TableRows(kept), includes_stages=True)
    order = row_order(stages, spans, global_batch=batch, seed=1, replay=replay)
    # Behind the stages' rows come those that are kept, then the first and the second stage's once more.
    edges = [total, total + kept, total + kept + 7, total + kept + 7 + 3]
    drawn: list[list[int]] = [[], [], []]
    for number, span in enumerate(spans):
        replayed = [row for row in order[span.first_step * batch : span.stop_step * batch] if row >= total]
        parts = [[row for row in replayed if low <= row < high] for low, high in itertools.pairwise(edges)]
        assert sum(len(part) for part in parts) == len(replayed)
        for position, part in enumerate(parts):
            expected = len(replayed) / (number + 1) if position <= number else 0
            assert abs(len(part) - expected) < 1
            drawn[position] += [row - edges[position] for row in part]
    for size, rows in zip((kept, 7, 3), drawn, strict=True):
        # One permutation after another, over the ends of stages too.
        for first in range(0, len(rows), size):
            turn = rows[first : first + size]
            assert len(set(turn)) == len(turn)
            assert set(turn) <= set(range(size))


def test_shares_of_kept_sources_are_those_of_the_replayed_rows() -> None:
    stages = [StageRows("a", 5, 1, steps=100)]
    kept = TableRows(24, (SourceShare(20, 1), SourceShare(4, 3)))
    exact = exact_share(0.25)
    spans = plan_stages(stages, global_batch=8, replayed_share=exact)
    replay = Replay(exact, kept)
    order = row_order(stages, spans, global_batch=8, seed=1, replay=replay)
    replayed = [row - 5 for row in order if row >= 5]
    assert len(replayed) == 200
    for stop in range(201):
        assert abs(sum(row < 20 for row in replayed[:stop]) - stop / 4) < 1
    assert set(replayed) == set(range(24))


def test_an_order_depends_on_the_seed_and_on_which_table_is_drawn_from() -> None:
    stages = [StageRows("a", 40, 1, steps=10), StageRows("b", 40, 1, steps=10)]
    exact = exact_share(0.5)
    spans = plan_stages(stages, global_batch=16, replayed_share=exact)

    def replayed(seed: int) -> list[int]:
        replay = Replay(exact, TableRows(40), includes_stages=True)
        return [row for row in row_order(stages, spans, global_batch=16, seed=seed, replay=replay) if row >= 80]

    rows = replayed(0)
    assert rows != replayed(1)
    kept = [row - 80 for row in rows if row < 120]
    again = [row - 120 for row in rows if row >= 120]
    assert kept[:40] != again[:40]
    assert sorted(kept[:40]) == sorted(again[:40]) == list(range(40))
    # Neither is the permutation that the stage itself was trained in.
    new = row_order(stages, spans, global_batch=16, seed=0, replay=Replay(exact, TableRows(40)))
    assert again[:40] != [row for row in new if row < 40][:40]


def test_a_stage_that_fills_no_batch_is_told_what_is_replayed() -> None:
    stages = [StageRows("a", 6, 1)]
    assert plan_stages(stages, global_batch=8, replayed_share=exact_share(0.5)) == [StageSpan("a", 0, 1)]
    with pytest.raises(UserError, match=r"stage a has 6 rows x 1 epochs, .* batch of 8 .*, of which 1 are replayed;"):
        plan_stages(stages, global_batch=8, replayed_share=exact_share(0.125))


def test_nothing_is_drawn_from_an_empty_table() -> None:
    stages = [StageRows("a", 5, 1)]
    spans = plan_stages(stages, global_batch=2, replayed_share=exact_share(0.5))
    with pytest.raises(ValueError, match="no rows to draw from"):
        row_order(stages, spans, global_batch=2, seed=0, replay=Replay(exact_share(0.5), TableRows(0)))


def recipe_of(*stages: str, train: dict[str, Any] | None = None, **keep: Any) -> Recipe:
    values = {
        "model": {"path": "m"},
        "stages": [{"name": name, "data": {"skill": "logic", "rows": 8}} for name in stages],
        "method": {"keep": {"data": {"skill": "code", "rows": 4}, "replay": 0.1, **keep}},
        "train": train or {},
        "output": "o",
    }
    return parse_recipe(values, place="the recipe")


def test_replay_that_cannot_be_is_refused_before_anything_is_loaded() -> None:
    assert recipe_of("a", "b", replay_stages=True).method.keep is not None
    with pytest.raises(
        UserError, match=r"replay_stages: true draws rows of stages that have finished, and there is one"
    ):
        recipe_of("a", replay_stages=True)
    for train in ({"label_smoothing_factor": 0.1}, {"average_tokens_across_devices": False}):
        (name,) = train
        with pytest.raises(UserError, match=rf"train.{name}: .* set method.keep.replay_loss: token"):
            recipe_of("a", train=train)
        recipe_of("a", train=train, replay_loss="token")
    recipe_of("a", train={"label_smoothing_factor": 0})
