"""What is evaluated: prompts, and how an answer to each is scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from epi_ds.data.conversations import Columns
from epi_ds.data.scoring import exact_match, same_final_number
from epi_ds.data.skills import Message, Split, get_skill, rows
from epi_ds.data.sources import skill_conversations, table_conversations
from epi_ds.recipe.models import DataSource, EvaluationData, Metric, Recipe, Stage

# Test rows do not depend on the seed of a run: scores of different seeds are of the same questions.
TEST_SEED = 0


class Task(NamedTuple):
    """Rows of one task and their scoring."""

    name: str
    conversations: Sequence[Sequence[Message]]
    """Ending with the reference answer."""
    check: Callable[[int, str], bool] | None
    """Whether an answer solves the row of this index; None for teacher-forced loss."""

    @property
    def higher_is_better(self) -> bool:
        """Accuracy rises, loss falls."""
        return self.check is not None


def load_conversations(source: DataSource, *, seed: int) -> list[list[Message]]:
    """Read or generate the rows of a data source."""
    if source.skill is not None:
        return skill_conversations(source.skill, split=source.split, size=source.rows or 0, seed=seed)
    prompt = (source.prompt,) if isinstance(source.prompt, str) else source.prompt or ()
    columns = Columns(source.messages, prompt, source.completion)
    return table_conversations(source.path or "", columns, split=source.split, subset=source.subset, limit=source.rows)


def build_tasks(recipe: Recipe) -> list[Task]:
    """Return everything that is evaluated: stages that can be, then the other skills the recipe names."""
    tasks = [task for stage in recipe.stages if (task := _stage_task(stage, recipe)) is not None]
    trained = {stage.data.skill for stage in recipe.stages}
    tasks += [
        _skill_task(skill, skill, recipe.evaluation.rows) for skill in recipe.evaluation.skills if skill not in trained
    ]
    return tasks


def _stage_task(stage: Stage, recipe: Recipe) -> Task | None:
    if stage.evaluation is not None:
        return _table_task(stage.name, stage.evaluation)
    if stage.data.skill is not None:
        return _skill_task(stage.name, stage.data.skill, recipe.evaluation.rows)
    return None


def _skill_task(name: str, skill_name: str, size: int) -> Task:
    skill = get_skill(skill_name)
    drawn = rows(skill_name, split=Split.TEST, size=size, seed=TEST_SEED)
    return Task(name, [row.messages for row in drawn], lambda index, answer: skill.check(drawn[index], answer))


def _table_task(name: str, source: EvaluationData) -> Task:
    conversations = load_conversations(source, seed=TEST_SEED)
    if source.metric is Metric.LOSS:
        return Task(name, conversations, None)
    compare = same_final_number if source.metric is Metric.FINAL_NUMBER else exact_match
    references = [messages[-1]["content"] for messages in conversations]
    return Task(name, conversations, lambda index, answer: compare(answer, references[index]))
