"""Run a script or a module as a rank: ``python -m epi_ds.launch.rank (SCRIPT | -m MODULE) [ARGUMENTS]``.

For scripts that know of torch's variables only. Before the script's first line they are set from srun's or mpirun's;
one process alone becomes the only rank.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from epi_ds.errors import UserError
from epi_ds.launch.environment import prepare_environment
from epi_ds.launch.lost_ranks import die_with_launcher
from epi_ds.launch.rank_environment import become_rank, only_rank


def run_as_rank(arguments: list[str]) -> None:
    """Become a rank and run what ``arguments`` name, with the arguments that follow. Raises UserError for no script."""
    if become_rank() is None:
        os.environ.update(only_rank().variables())
    die_with_launcher()
    prepare_environment()
    if arguments[:1] == ["-m"] and len(arguments) > 1:
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments and Path(arguments[0]).is_file():
        sys.argv = arguments
        # As Python itself does for a script.
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")
    else:
        shown = arguments[0] if arguments else "nothing"
        raise UserError(f"epi_ds.launch.rank runs a script that exists, or -m and a module; got {shown}")


if __name__ == "__main__":
    try:
        run_as_rank(sys.argv[1:])
    except UserError as error:
        # A script's too. Every rank meets the same mistake; one says it.
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
