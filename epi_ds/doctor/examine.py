"""All checks: of every node, of the job, and of the ranks together, be this process one of them or their starter."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from epi_ds.doctor.accelerator import accelerator
from epi_ds.doctor.compiler import compiler
from epi_ds.doctor.finding import Check, CheckFailedError, Finding, Level, Subject
from epi_ds.doctor.folder import folder as look_at_folder
from epi_ds.doctor.kernels import kernels
from epi_ds.doctor.memory import memory
from epi_ds.doctor.mpi import mpi
from epi_ds.doctor.nodes import Said, merged, named
from epi_ds.doctor.operators import locks, operators
from epi_ds.doctor.own_ranks import num_own_ranks, own_ranks
from epi_ds.doctor.report import LIMIT_SECONDS, Report
from epi_ds.doctor.slurm import slurm
from epi_ds.doctor.software import software
from epi_ds.launch.environment import prepare_environment
from epi_ds.launch.rank_environment import RankEnvironment, become_rank

if TYPE_CHECKING:
    from epi_ds.doctor.team import Team

# Libraries give up first, and say what they waited for.
_MARGIN_SECONDS = 5.0


class Checks(NamedTuple):
    """What one process can look at alone."""

    of_node: Sequence[Check] = ()
    """Made on every node."""
    of_job: Sequence[Check] = ()
    """Made once."""


def examine(folder: Path, *, seconds: float, tell: Callable[[list[Finding]], None]) -> list[Finding]:
    """Run all checks and tell what they find; return it.

    folder   that runs are written to
    seconds  how long ranks wait for each other
    tell     shows findings: on rank 0 those of all nodes, on another rank those of one that lost the others

    Sets in this process what DeepSpeed reads from the environment. Ends the process, with exit code 1, where ranks have
    lost each other or a check hangs; all that was found has been told then. Raises UserError where the variables of a
    starter contradict each other.
    """
    # torch prints every attempt to connect, and the frames of its C++; what matters of it comes as an error.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    place = become_rank()
    # Another rank's lines stand among those of all others.
    report = Report(tell if place is None or place.rank == 0 else lambda findings: tell(named(findings)))
    checks = _checks(folder, num_ranks=num_own_ranks if place is None else lambda: place.local_size)
    if place is None:
        _examine_alone(report, checks, folder, seconds=seconds)
    else:
        examine_as_rank(report, place, checks, folder=folder, seconds=seconds)
    return report.findings


def _examine_alone(report: Report, checks: Checks, folder: Path, *, seconds: float) -> None:
    report.run(Check(Subject.SOFTWARE, _prepare))
    # Before this process uses a device, which some clusters give to one process at a time.
    ranks = Check(Subject.RANKS, partial(own_ranks, folder, seconds=seconds))
    report.run(ranks, seconds=LIMIT_SECONDS + 4 * seconds)
    report.run_all([*checks.of_node, *checks.of_job])
    report.tell()


def examine_as_rank(report: Report, place: RankEnvironment, checks: Checks, *, folder: Path, seconds: float) -> None:
    """Run checks as one of the ranks, and tell on rank 0 what all of them found. Collective.

    Ends the process where the ranks do not meet, or lose each other.
    """
    prepared = report.run(Check(Subject.SOFTWARE, _prepare))
    team = _join(report, place, seconds=seconds) if prepared else None
    before = len(report.findings)
    if place.rank == 0 or (team is not None and team.leads):
        report.run_all(checks.of_node)
    own = report.findings[before:]
    together = team is not None and _work_together(report, team, own, folder)
    if place.rank == 0:
        report.run_all(checks.of_job)
    # What ended a rank may be known to that rank only.
    if place.rank == 0 or not together:
        report.tell()
    if not together:
        report.end()
    _leave(report)


def _join(report: Report, place: RankEnvironment, *, seconds: float) -> Team | None:
    """Return the ranks, once a message has gone round; None where they do not meet."""
    from epi_ds.doctor.reach import reach
    from epi_ds.doctor.team import assemble, meet, unanswered

    limit, late = seconds + _MARGIN_SECONDS, unanswered(place)
    store = report.attempt(Subject.RANKS, lambda: meet(place, seconds=seconds), seconds=limit, late=late)
    if store is None:
        return None
    team = report.attempt(Subject.RANKS, lambda: assemble(place, store, seconds=seconds), seconds=2 * limit, late=late)
    # Before checks that take long: what is lost by now is noticed at once.
    joined = team is not None and report.run(Check(Subject.RANKS, partial(reach, team)))
    if place.rank != 0:
        # Of ranks that are missing, rank 0 tells.
        report.findings.clear()
    return team if joined else None


def _work_together(report: Report, team: Team, own: list[Finding], folder: Path) -> bool:
    """Run the checks that all ranks make at the same time; return whether they came to their end. Collective.

    own  what this node found, the last of the report's findings; what all nodes found takes its place on rank 0
    """
    from epi_ds.doctor.clock import clock
    from epi_ds.doctor.reach import accelerator_reach
    from epi_ds.doctor.shared_folder import shared_folder

    found = report.attempt(Subject.RANKS, lambda: _of_all_nodes(team, own), seconds=2 * LIMIT_SECONDS)
    if found is None:
        return False
    del report.findings[len(report.findings) - len(own) :]
    report.findings += found if team.rank == 0 else []
    checks = [
        Check(Subject.RANKS, partial(accelerator_reach, team)),
        Check(Subject.CLOCK, partial(clock, team)),
        Check(Subject.FOLDER, partial(shared_folder, team, folder)),
    ]
    # After an error ranks are no longer at the same place.
    return all(report.run(check) for check in checks)


def _of_all_nodes(team: Team, own: list[Finding]) -> list[Finding]:
    """Return what the nodes found. Collective. Raises CheckFailedError where one does not come to an end."""
    from epi_ds.doctor.team import listed

    done = {node: f"done {node}" for node in team.leaders}
    if team.leads:
        team.store.set(done[team.nodes[team.rank]], "")
    try:
        # Checks take longer than a message may.
        team.store.wait(list(done.values()), timedelta(seconds=LIMIT_SECONDS))
    except RuntimeError as error:
        missing = listed([node for node, key in done.items() if not team.store.check([key])])
        said = f"no findings from {missing} within {LIMIT_SECONDS:.0f} s"
        raise CheckFailedError(Finding(Level.FAIL, Subject.RANKS, said, "run epi-ds doctor there alone")) from error
    said_by = team.gather(own if team.leads else None)
    return merged([Said(node, said_by[leader]) for node, leader in team.leaders.items()])


def _leave(report: Report) -> None:
    import torch.distributed as dist

    # NCCL that has failed may wait for its peers.
    timer = threading.Timer(_MARGIN_SECONDS, report.end)
    timer.daemon = True
    timer.start()
    dist.destroy_process_group()
    timer.cancel()


def _prepare() -> list[Finding]:
    prepare_environment()
    return []


def _checks(folder: Path, *, num_ranks: Callable[[], int]) -> Checks:
    """Return what there is to look at; each check imports by itself what is heavy or may be broken.

    num_ranks  says how many ranks the node has
    """
    of_node = [
        Check(Subject.SOFTWARE, software),
        Check(Subject.ACCELERATOR, accelerator),
        Check(Subject.COMPILER, compiler),
        Check(Subject.KERNELS, kernels),
        Check(Subject.OPERATORS, operators),
        Check(Subject.LOCKS, locks),
        Check(Subject.MEMORY, lambda: memory(num_ranks())),
        Check(Subject.FOLDER, partial(look_at_folder, folder)),
    ]
    return Checks(of_node, [Check(Subject.SLURM, slurm), Check(Subject.MPI, mpi)])
