"""What is evaluated: prompts, and how an answer to each is scored."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

from epi_ds.data.conversation import Conversation, conversation_of
from epi_ds.data.scoring import exact_match, final_number, same_final_number
from epi_ds.data.skills import Split, get_skill, rows
from epi_ds.data.sources import SkillRows, skill_conversations
from epi_ds.data.table import Reading, describe, read_table
from epi_ds.errors import UserError
from epi_ds.recipe.models import Recipe, Stage
from epi_ds.recipe.sources import DataSource, EvaluationData, Metric

logger = logging.getLogger(__name__)

# Test rows do not depend on the seed of a run: scores of different seeds are of the same questions.
TEST_SEED = 0


class Task(NamedTuple):
    """Rows of one task and their scoring."""

    name: str
    conversations: Sequence[Conversation]
    """Ending with the reference answer."""
    check: Callable[[int, str], bool] | None
    """Whether an answer solves the row of this index; None for teacher-forced loss."""

    @property
    def higher_is_better(self) -> bool:
        """Accuracy rises, loss falls."""
        return self.check is not None


def load_conversations(source: DataSource, *, seed: int) -> list[Conversation]:
    """Read or generate the rows of a data source."""
    found = source.resolve(seed=seed)
    if isinstance(found, SkillRows):
        return list(skill_conversations(found))
    reading = Reading()
    conversations = [row for _, row in read_table(found, reading)]
    # All ranks read them, and find the same.
    if os.environ.get("RANK", "0") == "0":
        for level, text in describe(found, reading):
            logger.log(level, "%s", text)
    return conversations


def build_tasks(recipe: Recipe) -> list[Task]:
    """Return everything that is evaluated: stages that can be, then the other skills and rows the recipe names.

    But for what is kept, see `kept_tasks`: its skills are among these, and not scored twice.
    """
    tasks = [task for stage in recipe.stages if (task := stage_task(stage, recipe)) is not None]
    keep = recipe.method.keep
    scored = {stage.skill for stage in recipe.stages}
    if keep is not None and keep.evaluation:
        scored |= {source.skill for source in keep.sources}
    tasks += [
        skill_task(skill, skill, recipe.evaluation.rows) for skill in recipe.evaluation.skills if skill not in scored
    ]
    return [*tasks, *(task_of(name, source) for name, source in recipe.evaluation.tasks.items())]


def stage_task(stage: Stage, recipe: Recipe) -> Task | None:
    """Return what a stage is scored by; None where it trains rows of a file and names none that are held out."""
    if stage.evaluation is not None:
        return task_of(stage.name, stage.evaluation)
    if stage.skill is not None:
        return skill_task(stage.name, stage.skill, recipe.evaluation.rows)
    return None


def task_of(name: str, source: EvaluationData) -> Task:
    """Return held-out rows and how answers to them are scored. Raises UserError for rows that cannot be scored so."""
    if source.skill is not None:
        return skill_task(name, source.skill, source.rows or 0, split=Split(source.split))
    return _table_task(name, source)


def skill_task(name: str, skill_name: str, size: int, *, split: Split = Split.TEST) -> Task:
    """Return rows of a skill, test rows unless told otherwise, and its own check."""
    skill = get_skill(skill_name)
    drawn = rows(skill_name, split=split, size=size, seed=TEST_SEED)
    return Task(
        name, [conversation_of(row.messages) for row in drawn], lambda index, answer: skill.check(drawn[index], answer)
    )


def _table_task(name: str, source: EvaluationData) -> Task:
    conversations = load_conversations(source, seed=TEST_SEED)
    if any(row.text is not None for row in conversations) and source.metric is not Metric.LOSS:
        raise UserError(f"evaluation of {name}: plain texts have no answers to compare; set metric: loss")
    if source.metric is Metric.LOSS:
        return Task(name, conversations, None)
    references = [row.answer for row in conversations]
    compare = same_final_number if source.metric is Metric.FINAL_NUMBER else exact_match
    if source.metric is Metric.FINAL_NUMBER and (without := [r for r in references if final_number(r) is None]):
        raise UserError(
            f"metric final_number of {name}: {len(without)} of {len(references)} reference answers hold no number, for "
            f"example {without[0]!r:.80}; no answer could be right, so use exact_match or loss, or other rows"
        )
    return Task(name, conversations, lambda index, answer: compare(answer, references[index]))
