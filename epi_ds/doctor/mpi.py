"""MPI, which runs do without: mpirun is one of the starters, and mpi4py says where its first rank is."""

from __future__ import annotations

import importlib.util
import shutil

from epi_ds.doctor.finding import Finding, Level, Subject


def mpi() -> list[Finding]:
    """Say what there is."""
    program = shutil.which("mpirun") or "no mpirun"
    module = "mpi4py" if importlib.util.find_spec("mpi4py") else "no mpi4py"
    said = f"{program}, {module} (for mpirun over several nodes; nothing else needs them)"
    return [Finding(Level.OK, Subject.MPI, said)]
