"""``python -m tests.faults [--quick] [--seed N]``: the whole suite, its table and its sum."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import tests.conftest  # noqa: F401 - the environment that ranks inherit
from tests.faults.suite import REFUSED, SURVIVED, Injected, Suite


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.monotonic()

    def report(injected: Injected) -> None:
        if injected.outcome not in (SURVIVED, REFUSED):
            print(f"{injected.outcome}: {injected.fault}, {injected.point}\n  {injected.detail}", flush=True)

    with tempfile.TemporaryDirectory(prefix="faults_") as work:
        suite = Suite(Path(work), arguments.seed, report)
        (suite.quick if arguments.quick else suite.full)()
        print(f"seed {arguments.seed}, {time.monotonic() - started:.0f} s")
        print(suite.table())
    return 0 if all(one.outcome in (SURVIVED, REFUSED) for one in suite.injected) else 1


if __name__ == "__main__":
    sys.exit(main())
