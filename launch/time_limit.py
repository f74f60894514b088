"""When Slurm ends this job."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Mapping
from datetime import datetime

logger = logging.getLogger(__name__)

_TIMEOUT_SECONDS = 20


def job_of(environment: Mapping[str, str]) -> str | None:
    """Return what Slurm's commands call this job, None outside of one; a task of an array by its place in it.

    The job id of one of an array's tasks is that of the whole array.
    """
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID")


def end_of_job(environment: Mapping[str, str], *, known: float | None = None) -> float | None:
    """Return when the job's time limit ends it, in seconds since the epoch; None where nothing ends it, or says when.

    known  what an earlier call said, which holds where Slurm does not answer

    Asks the controller, so one rank asks for all. The limit can be changed while a job runs: ask again near the end.
    """
    job = job_of(environment)
    if job is None:
        return None
    # squeue prints local time; the controller's and the nodes' time zones may differ, so ask for one.
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%e"]
    try:
        answer = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=True,
            timeout=_TIMEOUT_SECONDS,
            env={**environment, "TZ": "UTC", "SLURM_TIME_FORMAT": "standard"},
        ).stdout.strip()
        return parse_end(answer)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        # A container without Slurm's programs, or a controller that is busy.
        if known is not None:
            return known
        given = environment.get("SLURM_JOB_END_TIME", "")
        if given.isdigit():
            return float(given)
        logger.warning(
            "when job %s ends is not known (%s), so nothing is saved before its time limit unless a signal says so: "
            "submit it with --signal=USR1@120",
            job,
            error,
        )
        return None


def parse_end(answer: str) -> float | None:
    """Return squeue's ``2026-11-25T18:00:00``, in UTC, in seconds since the epoch; None for ``N/A`` and ``NONE``.

    Raises ValueError for anything else.
    """
    return None if answer in ("N/A", "NONE") else datetime.fromisoformat(f"{answer}+00:00").timestamp()
