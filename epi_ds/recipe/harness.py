"""``evaluation.lm_eval``: general ability, by the tasks of lm-evaluation-harness."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

from epi_ds.errors import Problem, UserError

DEFAULT_LIMIT = 200


class HarnessSection(BaseModel):
    """General ability, scored by tasks of lm-evaluation-harness beside all others. Wants the extra ``eval``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: tuple[str, ...] = Field(min_length=1)
    """Tasks, groups or tags by the names that lm-evaluation-harness or files in ``include_path`` give them:
    ``[arc_easy, hellaswag]``."""
    include_path: str | None = None
    """Folder of task files of one's own, which come before those of lm-evaluation-harness."""
    limit: int | None = Field(DEFAULT_LIMIT, ge=1)
    """First rows of every task; ``null`` for all of them."""
    num_fewshot: int | None = Field(None, ge=0)
    """Solved examples in front of every question; default what each task says. A task that says 0 keeps it."""
    max_length: int | None = Field(None, ge=2)
    """Most tokens of a request; default what the model was made for. What is longer is cut at its beginning, and
    counted."""
    apply_chat_template: bool = False
    """Put questions as a user's turns into the model's chat template, as lm-evaluation-harness does when it is told
    to."""

    @field_validator("tasks")
    @classmethod
    def _distinct_tasks(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"a task is scored once, repeated: {', '.join(repeated)}")
        return names

    @field_validator("include_path")
    @classmethod
    def _is_a_folder(cls, path: str | None) -> str | None:
        if path is not None and not Path(path).is_dir():
            raise UserError(f"{path} is no folder; give one that task files (.yaml) lie in")
        return path


def harness_problems() -> list[Problem]:
    """Return a problem where lm-evaluation-harness is not installed. Does not import it, which takes a second."""
    if importlib.util.find_spec("lm_eval") is None:
        return [Problem("evaluation.lm_eval", "needs lm_eval, which is not installed here: pip install 'epi-ds[eval]'")]
    return []
