"""Tasks of lm-evaluation-harness, found by name and loaded with their rows before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.tasks import TaskManager

from epi_ds.errors import RemedyError, UserError
from epi_ds.evaluation.harness.finding import Places, find_tasks
from epi_ds.evaluation.harness.surroundings import quiet, seeded
from epi_ds.recipe.harness import HarnessSection

# What lm-evaluation-harness draws solved examples with, unless told otherwise.
FEWSHOT_SEED = DEFAULT_OTHER_SEED


class Loaded(NamedTuple):
    """Tasks with their rows, in the order in which they were asked for."""

    tasks: dict[str, Any]
    """By name; of groups all that are in them."""
    groups: dict[str, Any]
    shown: tuple[str, ...]
    """What has a score: tasks, and in the place of its tasks a group that says how their scores are put together."""


Once = Callable[[Callable[[], Any]], Any]
"""Calls its argument in the first of all processes and returns the result in each, as `on_first_rank` does."""


def alone(action: Callable[[], Any]) -> Any:
    """`Once`, where there is one process."""
    return action()


def load_tasks(section: HarnessSection, *, once: Once = alone) -> Loaded:
    """Return the tasks of a section, their prompts tried.

    Raises UserError for a name that there is not, and for a task that cannot be made or cannot be scored here, and
    RemedyError for rows that would have to be fetched where the hub cannot be reached.
    """
    # Thousands of files may have to be read: not by every rank.
    places: Places = once(lambda: find_tasks(section))
    loaded: list[Loaded] = []
    # Whoever comes second finds what the first one fetched, and has no need to hear the warnings again.
    once(lambda: loaded.append(_load(places, section)))
    if loaded:
        return loaded[0]
    with quiet():
        return _load(places, section)


def _load(places: Places, section: HarnessSection) -> Loaded:
    manager = TaskManager(include_defaults=False)
    manager.task_index.update(places.known)
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    shown: list[str] = []
    for name in section.tasks:
        with seeded(), _told(name):
            found = manager.load([places.files.get(name, name)])
        own_groups = found.get("groups", {})
        for task_name, task in found["tasks"].items():
            if task_name in tasks:
                raise UserError(f"evaluation.lm_eval.tasks: {task_name} is in {name} too, and is scored once")
            with seeded(), _told(task_name):
                _prepare(task, section)
        tasks |= found["tasks"]
        groups |= own_groups
        is_one = name in own_groups and own_groups[name].has_aggregation
        shown += [name] if is_one else list(found["tasks"])
    return Loaded(tasks, groups, tuple(shown))


def _prepare(task: Any, section: HarnessSection) -> None:
    """Give a task its number of solved examples, as lm-evaluation-harness does, and make its prompts once."""
    name = task.task_name
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(
            f"task {name} runs programs that the model writes, which is not done here; score the export with "
            "lm_eval --confirm_run_unsafe_code in a sandbox"
        )
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"task {name} shows pictures or sound, and language models are scored here; leave it out")
    own = task.get_config("num_fewshot")
    if section.num_fewshot is not None and own != 0:
        task.set_config("num_fewshot", section.num_fewshot)
    elif own is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(FEWSHOT_SEED)
    with quiet():
        task.build_all_requests(limit=section.limit)


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Turn what a task raises, whose files may be anybody's, into one message."""
    try:
        yield
    except (UserError, RemedyError):
        raise
    except Exception as error:  # templates, functions and files of the user's, or of whoever wrote the task
        if not _is_unreachable(error):
            raise UserError(f"task {name} cannot be made: {_said(error)}; correct its file or leave it out") from error
        raise RemedyError(
            f"the rows of task {name} would have to be fetched, and the hub cannot be reached: {_said(error)}; fetch "
            "them once where there is a network, with the same HF_HOME, or give a task whose data_files lie here by "
            "include_path"
        ) from error


def _is_unreachable(error: Exception) -> bool:
    """Whether rows are not here, and there is no network to fetch them by; libraries raise this as several types."""
    words = str(error).lower()
    return isinstance(error, ConnectionError) or (
        isinstance(error, OSError) and ("connect" in words or "offline" in words)
    )


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
