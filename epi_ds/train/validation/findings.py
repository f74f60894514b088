"""What a validation tells: problems, warnings, and what could not be checked here."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from epi_ds.errors import Problem, RemedyError, UserError

# A message that begins with a key of the recipe says itself where it belongs.
_KEY = re.compile(r"(?:model|stages|method|train|evaluation)(?:\.\w+)+(?=[ :])")


class Kind(StrEnum):
    """How much a finding matters."""

    PROBLEM = "problem"
    """The run would end with it."""
    WARNING = "warning"
    """The run goes on, and may not do what is meant."""
    UNCHECKED = "not checked"
    """Nothing is known of it here."""


class Finding(NamedTuple):
    """Something to say of a recipe."""

    kind: Kind
    key: str
    """Dotted, with the positions of list items; empty for the whole recipe."""
    text: str


@dataclass
class Findings:
    """Takes in what is found."""

    found: list[Finding] = field(default_factory=list)

    def of(self, kind: Kind) -> list[Finding]:
        """Return the findings of a kind, in the order in which they were made."""
        return [one for one in self.found if one.kind is kind]

    def problem(self, problem: Problem) -> None:
        """Take a problem in."""
        self._add(Kind.PROBLEM, problem.key, problem.text)

    def warning(self, key: str, text: str) -> None:
        """Take a warning in."""
        self._add(Kind.WARNING, key, text)

    def unchecked(self, key: str, text: str) -> None:
        """Take in what could not be checked, and why."""
        self._add(Kind.UNCHECKED, key, text)

    def told(self, key: str) -> _Told:
        """Return a context that takes in what is raised: a UserError as a problem with a key of the recipe.

        With the one that its message begins with, where it does. A RemedyError is of this machine and not of the
        recipe: what it ends is not checked.
        """
        return _Told(self, key)

    def _add(self, kind: Kind, key: str, text: str) -> None:
        found = Finding(kind, key, text)
        # The same file may be the source of several stages.
        if found not in self.found:
            self.found.append(found)


class _Told(NamedTuple):
    """See `Findings.told`."""

    findings: Findings
    key: str

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if not isinstance(error, (UserError, RemedyError)):
            return False
        named = _KEY.match(str(error))
        key = named[0] if named else self.key
        text = str(error).removeprefix(key).removeprefix(":").lstrip()
        if isinstance(error, UserError):
            self.findings.problem(Problem(key, text))
        else:
            self.findings.unchecked(key, text)
        return True
