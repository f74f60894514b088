"""What Slurm will do to a job: end it, and start it again or not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping

from epi_ds.doctor.finding import Finding, Level, Subject
from epi_ds.launch.time_limit import job_of

_COMMANDS = ("sbatch", "squeue", "scontrol")
_ANSWER_SECONDS = 30


def slurm() -> list[Finding]:
    """Say which Slurm there is and, inside a job, when it ends and whether it begins again; nothing without Slurm."""
    job = job_of(os.environ)
    missing = [name for name in _COMMANDS if shutil.which(name) is None]
    if missing:
        if job is None:
            return []
        said = f"inside job {job}, and without {', '.join(missing)} on the PATH: nothing is known of its end"
        return [Finding(Level.WARN, Subject.SLURM, said, "in a container, mount the commands of Slurm")]
    try:
        version = _ask("sbatch", "--version")
        if job is None:
            return [Finding(Level.OK, Subject.SLURM, f"{version}; not inside a job")]
        left = _ask("squeue", "--noheader", f"--jobs={job}", "--format=%L")
        shown = _ask("scontrol", "--oneliner", "show", "job", job)
    except RuntimeError as error:
        return [Finding(Level.WARN, Subject.SLURM, str(error), "ask whoever runs the cluster")]
    return [Finding(Level.OK, Subject.SLURM, f"{version}; job {job}", measured=f"{left} left"), requeue(shown)]


def requeue(shown: str) -> Finding:
    """Return whether a job may begin again, from what ``scontrol show job`` prints of it."""
    fields: Mapping[str, str] = dict(re.findall(r"(\w+)=(\S*)", shown))
    if fields.get("Requeue") == "1":
        return Finding(Level.OK, Subject.SLURM, "the job begins again after a preemption or a lost node")
    said = f"the job ends for good when it is preempted or loses a node (Requeue={fields.get('Requeue', 'unknown')})"
    return Finding(Level.WARN, Subject.SLURM, said, "#SBATCH --requeue, as epi-ds launch slurm writes it")


def _ask(*command: str) -> str:
    """Return what a command of Slurm's prints. Raises RuntimeError, with what it said, where that is an error."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=True)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{command[0]} did not answer within {_ANSWER_SECONDS} s") from error
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().partition("\n")[0]
        raise RuntimeError(f"{' '.join(command)} failed: {said}") from error
    return done.stdout.strip()
