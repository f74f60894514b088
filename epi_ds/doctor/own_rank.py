"""One of the ranks that own_ranks.py starts: makes the checks that ranks make together, and writes what they found."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from epi_ds.doctor.examine import Checks, examine_as_rank
from epi_ds.doctor.finding import Finding, to_json
from epi_ds.doctor.report import Report
from epi_ds.launch.lost_ranks import die_with_launcher
from epi_ds.launch.rank_environment import discover


def main(written: str, folder: str, seconds: str) -> None:
    """Examine ``folder`` with the other ranks; rank 0 writes the findings to the file ``written``."""
    die_with_launcher()

    def tell(findings: list[Finding]) -> None:
        # Rank 0 says of the others that they are missing.
        if os.environ["RANK"] == "0":
            Path(written).write_text(to_json(findings))

    # The launcher ends all ranks when one ends with an error, also the one that is about to say what it is.
    report = Report(tell, exit_code=0)
    place = discover(os.environ)
    if place is None:
        raise RuntimeError("this module is run by the launcher that own_ranks starts, which sets RANK and WORLD_SIZE")
    examine_as_rank(report, place, Checks(), folder=Path(folder), seconds=float(seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
