"""Batch scripts for Slurm: written where a person reads them, and submitted."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from epi_ds.errors import RemedyError, UserError
from epi_ds.launch.stop_signals import REQUEUE_EXIT_CODE

_TEMPLATE = Path(__file__).parent / "templates" / "job.sbatch"


class Container(StrEnum):
    """What the ranks run in."""

    NONE = "none"
    APPTAINER = "apptainer"
    PYXIS = "pyxis"


@dataclass(frozen=True)
class Image:
    """A container image and how it is run."""

    container: Container = Container.NONE
    path: str | None = None
    """A file, or what Pyxis pulls."""
    mounts: tuple[str, ...] = ()
    """``SOURCE:TARGET``, besides the working directory."""

    def __post_init__(self) -> None:
        if (self.container is Container.NONE) != (self.path is None):
            raise UserError("--container and --image go together: give both, or neither for bare metal")
        if self.container is Container.NONE and self.mounts:
            raise UserError(f"--mount {self.mounts[0]} would be ignored without --container")


@dataclass(frozen=True)
class SlurmJob:
    """What a batch script asks Slurm for, and what its ranks run."""

    name: str
    command: tuple[str, ...]
    """Arguments of ``python -m epi_ds.launch.rank``."""
    folder: Path
    """Where the script and the logs lie."""
    working_directory: Path
    nodes: int = 1
    ranks_per_node: int = 1
    gpus_per_node: int | None = None
    cpus_per_rank: int | None = None
    options: tuple[str, ...] = ()
    """Further options of sbatch, such as ``--time=4:00:00``."""
    grace_seconds: int = 120
    """How long before the time limit ranks are told to save and stop."""
    retries: int = 2
    """So often a job that failed, but not by a mistake of the user's, is queued again. One that was told to stop always
    is."""
    variants: tuple[tuple[str, ...], ...] = ()
    """Arguments that each task of an array adds to the command; none for a job that is no array."""
    parallel: int | None = None
    """Tasks of the array that run at the same time; None for as many as there is room for."""
    image: Image = field(default_factory=Image)
    python: str = sys.executable

    def __post_init__(self) -> None:
        for what in (self.name, str(self.folder), str(self.working_directory)):
            if found := re.search(r"[\s%\"']", what):
                raise UserError(f"{what!r} has {found.group()!r} in it, which sbatch reads otherwise; use another name")

    @property
    def path(self) -> Path:
        """The batch script."""
        return self.folder / f"{self.name}.sbatch"

    def render(self) -> str:
        """Return the text of the script."""
        # Not for every command that lists its options.
        import jinja2

        environment = jinja2.Environment(
            undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
        )
        environment.filters["quote"] = shlex.quote
        return environment.from_string(_TEMPLATE.read_text()).render(
            job=self,
            path=self.path,
            log=self.folder / ("%x-%A_%a.log" if self.variants else "%x-%j.log"),
            program=" ".join(shlex.quote(part) for part in (*self._inside(), self.python)),
            failures=shlex.quote(f"{self.folder}/{self.name}-failures-"),
            requeue_code=REQUEUE_EXIT_CODE,
        )

    def _inside(self) -> list[str]:
        """Return what stands between srun and the program that runs in a container."""
        here, image = str(self.working_directory), self.image
        if image.container is Container.APPTAINER:
            devices = ["--nv"] if self.gpus_per_node else []
            binds = [word for mount in (here, *image.mounts) for word in ("--bind", mount)]
            return ["apptainer", "exec", *devices, *binds, "--pwd", here, str(image.path)]
        if image.container is Container.PYXIS:
            mounts = ",".join((f"{here}:{here}", *image.mounts))
            return [f"--container-image={image.path}", f"--container-mounts={mounts}", f"--container-workdir={here}"]
        return []

    def write(self) -> None:
        """Write the script."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path.write_text(self.render())


def submit_command(job: SlurmJob, *, after: str | None) -> list[str]:
    """Return the command that submits a job's script.

    after  the id of a job that has to have ended well before it starts
    """
    # A dependency that failed would otherwise leave the job in the queue for good.
    dependency = [] if after is None else [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    return ["sbatch", "--parsable", *dependency, str(job.path)]


def submit(jobs: Sequence[SlurmJob], *, after: str | None = None) -> list[str]:
    """Submit jobs whose scripts are written, each to start when the one before it has ended well; return their ids.

    after  the id of a job before the first one

    Raises RemedyError where sbatch is missing or refuses one, with what it said; the jobs before that are submitted.
    """
    if shutil.which("sbatch") is None:
        raise RemedyError("sbatch is not installed here; submit from a login node of the cluster")
    ids: list[str] = []
    for job in jobs:
        # --parsable prints the id, and the cluster's name behind a semicolon.
        done = subprocess.run(submit_command(job, after=after), capture_output=True, text=True)
        if done.returncode:
            raise RemedyError(
                f"sbatch {job.path} failed: {done.stderr.strip()}; correct {job.path} and submit it by hand"
            )
        after = done.stdout.strip().partition(";")[0]
        ids.append(after)
    return ids
