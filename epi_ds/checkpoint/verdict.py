"""Ranks decide together: what fails on one fails on all, with the same words, and nobody waits for another."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from epi_ds.errors import CheckpointError, RemedyError, UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Errors whose message is all there is to say; others are somebody's bug.
_SAID_IN_WORDS = (OSError, CheckpointError, RemedyError, UserError)
# Errors that stay what they are where every rank that failed met one; all others become an AgreedError.
_KEPT = (UserError, RemedyError)


class AgreedError(CheckpointError):
    """Raised by `agree` on all ranks because an action failed on some. Their process group is sound."""


class _Verdict(NamedTuple):
    """What one rank tells the others about an action."""

    problem: str | None = None
    """Why it failed; None where it did not."""
    raises: type[Exception] = AgreedError
    """What the failure is raised as."""
    seen: str = ""
    """What every rank must have seen alike."""


def agree(action: Callable[[], T], *, seen: Callable[[T], str] = lambda _: "") -> T:
    """Run ``action`` on every rank; where it fails on any, raise the same error on all. Collective.

    seen  describes what of the result must be the same on every rank

    Raises UserError or RemedyError where every failure is one, else AgreedError. Without a verdict that all share, the
    rank with the damaged file raises and the others wait for it in their next collective until the group times out.
    """
    try:
        result = action()
        verdict, cause = _Verdict(seen=seen(result)), None
    except Exception as error:  # whatever it is, the others must hear of it
        verdict, cause = _verdict_on(error), error
    verdicts: list[_Verdict] = [verdict] * dist.get_world_size()
    dist.all_gather_object(verdicts, verdict)
    failed = {rank: other for rank, other in enumerate(verdicts) if other.problem is not None}
    kinds = {other.raises for other in failed.values()}
    kind = kinds.pop() if len(kinds) == 1 else AgreedError
    if kind in _KEPT:
        raise kind("\n".join(dict.fromkeys(str(other.problem) for other in failed.values()))) from cause
    if failed:
        raise AgreedError(_by_rank({rank: str(other.problem) for rank, other in failed.items()})) from cause
    if len({other.seen for other in verdicts}) > 1:
        lines = (f"rank {rank}: {other.seen}" for rank, other in enumerate(verdicts))
        raise AgreedError(
            "the ranks do not see the same checkpoint; put it where every node reads the same files\n"
            + "\n".join(lines)
        )
    return result


def _by_rank(problems: dict[int, str]) -> str:
    """Return what ranks say, once where all of them say the same."""
    if len(problems) == dist.get_world_size() and len(set(problems.values())) == 1:
        return problems[0]
    return "\n".join(f"rank {rank}: {problem}" for rank, problem in problems.items())


class _Outcome(NamedTuple):
    """What rank 0 tells the others about an action that only it took."""

    result: Any
    verdict: _Verdict


def on_first_rank(action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 and return its result to all; where it fails, raise on all. Collective.

    Raises UserError or RemedyError where it does, else AgreedError.
    """
    outcomes: list[_Outcome | None] = [None]
    cause: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcomes[0] = _Outcome(action(), _Verdict())
        except Exception as error:  # whatever it is, the others must hear of it
            outcomes[0], cause = _Outcome(None, _verdict_on(error)), error
    dist.broadcast_object_list(outcomes, src=0)
    outcome = outcomes[0]
    if outcome is None:
        raise RuntimeError("nothing came from rank 0; the process group is not sound")
    if outcome.verdict.problem is not None:
        raise outcome.verdict.raises(outcome.verdict.problem) from cause
    result: T = outcome.result
    return result


def _verdict_on(error: Exception) -> _Verdict:
    if not isinstance(error, _SAID_IN_WORDS):
        logger.exception("rank %d", dist.get_rank())
    kind = next((kept for kept in _KEPT if isinstance(error, kept)), AgreedError)
    return _Verdict(describe(error), raises=kind)


def describe(error: BaseException) -> str:
    """Return an error as one sentence; the type is said where the words alone would not do."""
    return str(error) if isinstance(error, _SAID_IN_WORDS) else f"{type(error).__name__}: {error}"
