from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epi_ds.train.stages import StageRows, StageSpan, epoch_ends, plan_stages, row_order, stage_at
from epi_ds.train.streams import SourceShare

STAGES = [StageRows("a", 10, 1), StageRows("b", 7, 3), StageRows("c", 4, 1)]


def test_stages_are_laid_end_to_end_in_whole_batches() -> None:
    assert plan_stages(STAGES, global_batch=4) == [
        StageSpan("a", 0, 2),
        StageSpan("b", 2, 7),
        StageSpan("c", 7, 8),
    ]


def test_a_stage_without_a_whole_batch_is_named() -> None:
    with pytest.raises(ValueError, match="stage c has 4 rows x 1 epochs, fewer than one global batch of 5"):
        plan_stages(STAGES, global_batch=5)


@given(
    st.lists(st.tuples(st.integers(8, 30), st.integers(1, 3)), min_size=1, max_size=4),
    st.integers(1, 8),
    st.integers(0, 2**31),
)
def test_order_is_one_permutation_per_stage_and_epoch(sizes: list[tuple[int, int]], batch: int, seed: int) -> None:
    stages = [StageRows(str(i), rows, epochs) for i, (rows, epochs) in enumerate(sizes)]
    spans = plan_stages(stages, global_batch=batch)
    order = row_order(stages, spans, global_batch=batch, seed=seed)
    assert len(order) == spans[-1].stop_step * batch
    offset = position = 0
    for stage, span in zip(stages, spans, strict=True):
        own = order[position : position + span.num_steps * batch]
        for epoch in range(stage.epochs):
            part = own[epoch * stage.num_rows : (epoch + 1) * stage.num_rows]
            assert len(set(part)) == len(part)
            assert set(part) <= set(range(offset, offset + stage.num_rows))
        offset += stage.num_rows
        position += len(own)


def test_an_epoch_ends_with_the_step_that_trains_its_last_row() -> None:
    # Two and a half steps each, then a stage whose rows are fewer than a step's, and one that is cut short.
    stages = [StageRows("a", 20, 2), StageRows("b", 3, 6), StageRows("c", 16, 1, steps=1)]
    spans = plan_stages(stages, global_batch=8)
    assert [span.stop_step for span in spans] == [5, 7, 8]
    assert sorted(epoch_ends(stages, spans, global_batch=8)) == [3, 5, 6, 7, 8]


@given(
    st.lists(st.tuples(st.integers(8, 30), st.integers(1, 3)), min_size=1, max_size=4),
    st.integers(1, 8),
)
def test_epochs_end_where_their_last_rows_are(sizes: list[tuple[int, int]], batch: int) -> None:
    stages = [StageRows(str(i), rows, epochs) for i, (rows, epochs) in enumerate(sizes)]
    spans = plan_stages(stages, global_batch=batch)
    order = row_order(stages, spans, global_batch=batch, seed=0)
    found, offset = set(), 0
    for stage, span in zip(stages, spans, strict=True):
        seen = [0] * stage.num_rows
        for step in range(span.first_step, span.stop_step):
            before = min(seen)
            for row in order[step * batch : (step + 1) * batch]:
                seen[row - offset] += 1
            if min(seen) > before or step + 1 == span.stop_step:
                found.add(step + 1)
        offset += stage.num_rows
    assert epoch_ends(stages, spans, global_batch=batch) == found


def test_order_depends_on_the_seed_the_stage_and_the_epoch() -> None:
    stages = [StageRows("a", 50, 2), StageRows("b", 50, 1)]
    spans = plan_stages(stages, global_batch=1)
    one, other = (row_order(stages, spans, global_batch=1, seed=seed) for seed in (0, 1))
    assert one != other
    assert one[:50] != one[50:100] != [i - 50 for i in one[100:]]
    assert one == row_order(stages, spans, global_batch=1, seed=0)


def test_a_longer_batch_reads_the_same_rows() -> None:
    """The position of a run is the number of rows it has consumed: the list does not depend on how it is cut."""
    stages = [StageRows("a", 48, 1), StageRows("b", 24, 1)]
    orders = [
        row_order(stages, plan_stages(stages, global_batch=batch), global_batch=batch, seed=3) for batch in (1, 4, 8)
    ]
    assert orders[0] == orders[1] == orders[2]


def test_steps_know_their_stage() -> None:
    spans = plan_stages(STAGES, global_batch=4)
    assert [stage_at(spans, step).name for step in range(9)] == list("aabbbbbcc")


@given(
    sources=st.lists(st.tuples(st.integers(1, 40), st.floats(0.01, 10)), min_size=1, max_size=5),
    steps=st.integers(1, 20),
    batch=st.integers(1, 16),
    seed=st.integers(0, 5),
)
def test_sources_keep_to_their_shares_in_every_batch(
    sources: list[tuple[int, float]], steps: int, batch: int, seed: int
) -> None:
    shares = tuple(SourceShare(*one) for one in sources)
    total = sum(share for _, share in sources)
    stages = [
        StageRows("before", 3, 1, steps=2),
        StageRows("mixed", sum(rows for rows, _ in sources), 1, shares, steps),
    ]
    spans = plan_stages(stages, global_batch=batch)
    assert spans[1] == StageSpan("mixed", 2, 2 + steps)
    order = row_order(stages, spans, global_batch=batch, seed=seed)[2 * batch :]
    assert len(order) == steps * batch
    first = 3
    for rows, share in sources:
        positions = [index for index, row in enumerate(order) if first <= row < first + rows]
        # Less than one row off its share, after any number of rows.
        for stop in range(len(order) + 1):
            assert abs(sum(position < stop for position in positions) - stop * share / total) < 1 + 1e-9
        own = [order[position] - first for position in positions]
        # One permutation after another.
        for begin in range(0, len(own) - rows + 1, rows):
            assert sorted(own[begin : begin + rows]) == list(range(rows))
        first += rows


def test_sources_without_shares_are_one_table() -> None:
    stages = [StageRows("a", 12, 2)]
    spans = plan_stages(stages, global_batch=4)
    order = row_order(stages, spans, global_batch=4, seed=1)
    assert sorted(order) == sorted([*range(12)] * 2)
    longer = [StageRows("a", 12, 1, steps=9)]
    assert row_order(longer, plan_stages(longer, global_batch=4), global_batch=4, seed=1)[:24] == order


def test_the_order_is_that_of_earlier_releases() -> None:
    """A run that an earlier release began goes on with the rows that it would have trained."""
    mixed = StageRows("b", 6, 1, (SourceShare(4, 3.0), SourceShare(2, 1.0)), steps=3)
    stages = [StageRows("a", 5, 2), mixed]
    order = row_order(stages, plan_stages(stages, global_batch=2), global_batch=2, seed=3)
    assert order == [1, 0, 4, 2, 3, 3, 1, 2, 0, 4, 8, 5, 7, 10, 6, 6]
