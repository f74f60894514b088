"""Where the tasks that are asked for lie: in a folder of one's own, or among the thousands of lm-evaluation-harness.

lm-evaluation-harness parses all of its files to know their names, which takes ten seconds and more. A task that one
line of one file names is found by reading them as text, in two; whatever else is asked for, groups and tags, is left to
lm-evaluation-harness.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lm_eval
import lm_eval.tasks
import yaml
from lm_eval.tasks import TaskManager

from epi_ds.errors import UserError
from epi_ds.recipe.harness import HarnessSection

_NAMED = re.compile(rb"^(?:task|group):[ \t]*['\"]?([^\s'\"#\[\]]+)['\"]?[ \t]*(?:#.*)?$", re.MULTILINE)
_SHOWN = 3


class Places(NamedTuple):
    """Where tasks lie; small enough to be sent to all ranks, unless lm-evaluation-harness had to look for them."""

    files: dict[str, str]
    """Of tasks, by name."""
    known: dict[str, Any]
    """What lm-evaluation-harness knows, by name, where files alone would not do."""


class _AnyTag(yaml.SafeLoader):
    """Reads what has tags as well: a function that a task file names is nothing to find a name by."""


_AnyTag.add_multi_constructor("!", lambda loader, tag, node: None)


def find_tasks(section: HarnessSection) -> Places:
    """Return where the tasks of a section lie. Raises UserError for names that there are not, all of them at once."""
    own = TaskManager(include_path=section.include_path, include_defaults=False)
    others = [name for name in section.tasks if name not in {*own.all_subtasks, *own.all_tags}]
    if not others:
        return Places({}, own.task_index)
    # Members of a group may be anybody's.
    if not set(others) & set(own.all_groups):
        named, mentioned = _read_names(others)
        if missing := [name for name in others if name not in mentioned]:
            raise _unknown(missing, [*own.all_tasks, *named], section)
        files = {name: str(named[name][0]) for name in others if len(named.get(name, ())) == 1}
        if files.keys() == set(others) and not any(map(_is_group, files.values())):
            return Places(files, own.task_index)
    every = TaskManager(include_path=section.include_path)
    if missing := [name for name in section.tasks if name not in every.task_index]:
        raise _unknown(missing, every.all_tasks, section)
    return Places({}, every.task_index)


def _read_names(wanted: Sequence[str]) -> tuple[dict[str, list[Path]], set[str]]:
    """Return the files of lm-evaluation-harness by the names that they give, and which wanted names are in any."""
    named: dict[str, list[Path]] = {}
    mentioned: set[str] = set()
    for path in sorted(Path(lm_eval.tasks.__file__).parent.rglob("*.yaml")):
        text = path.read_bytes()
        mentioned |= {name for name in wanted if name.encode() in text}
        for name in _NAMED.findall(text):
            named.setdefault(name.decode(), []).append(path)
    return named, mentioned


def _is_group(path: str) -> bool:
    return re.search(rb"^group:", Path(path).read_bytes(), re.MULTILINE) is not None


def _unknown(missing: Sequence[str], known: Iterable[str], section: HarnessSection) -> UserError:
    of_own = "" if section.include_path is None else f" or of {section.include_path}"
    names = "; nor ".join(f"{name!r}{_nearest(name, known)}" for name in missing)
    unreadable = "".join(f"; {told}" for told in _unreadable(section.include_path))
    return UserError(
        f"no task of lm-evaluation-harness {lm_eval.__version__}{of_own} is called {names}{unreadable}; "
        "`lm_eval ls tasks` lists those that it brings"
    )


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, sorted(set(known)), n=_SHOWN)
    return f" (nearest: {', '.join(close)})" if close else ""


def _unreadable(folder: str | None) -> Iterator[str]:
    """Say which task files cannot be read: lm-evaluation-harness passes over them in silence."""
    for path in sorted(Path(folder).rglob("*.yaml")) if folder is not None else ():
        try:
            yaml.load(path.read_bytes(), Loader=_AnyTag)
        except yaml.YAMLError as error:
            yield f"{path} cannot be read: {' '.join(str(error).split())}"
