"""``epi-ds doctor``."""

from __future__ import annotations

import contextlib
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from epi_ds.doctor.finding import Finding

_STYLES = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}


def doctor(
    folder: Annotated[
        Path, typer.Argument(help="The folder that runs will be written to, which all nodes must share.")
    ] = Path(),
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that ranks wait for each other.")] = 60,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say whether training will work here, a line each, with the remedy. Exits 1 where it will not.

    As a rank of srun, mpirun, torchrun or the deepspeed launcher it looks at all nodes, and at how they reach each
    other: srun epi-ds doctor. Started alone it starts two ranks of its own, or one for each GPU.
    """
    from epi_ds.doctor.examine import examine
    from epi_ds.doctor.finding import Level, worst

    tell = partial(_tell, Console(file=sys.stdout, highlight=False), as_json=as_json)
    # Libraries greet on standard output, where the report goes.
    with contextlib.redirect_stdout(sys.stderr):
        found = examine(folder, seconds=timeout, tell=tell)
    raise typer.Exit(1 if worst(found) is Level.FAIL else 0)


def _tell(console: Console, findings: list[Finding], *, as_json: bool) -> None:
    from epi_ds.doctor.finding import Level, to_json

    if os.environ.get("RANK", "0") != "0":
        # The one report is rank 0's; this says why this rank is missing there.
        for finding in findings:
            if finding.level is Level.FAIL:
                print(_line(finding), file=sys.stderr)
    elif as_json:
        print(to_json(findings), file=console.file)
    elif console.is_terminal:
        console.print(_table(findings))
    else:
        for finding in findings:
            print(_line(finding), file=console.file)
    # A rank that has lost the others ends without Python's own clean-up.
    console.file.flush()


def _line(finding: Finding) -> str:
    remedy = f" -> {finding.remedy}" if finding.remedy else ""
    return f"{finding.level.value:<5}{finding.subject.value:<12} {_sentence(finding)}{remedy}"


def _sentence(finding: Finding) -> str:
    where = f"{', '.join(finding.nodes)}: " if finding.nodes else ""
    return f"{where}{finding.said}{': ' if finding.measured else ''}{finding.measured}"


def _table(findings: list[Finding]) -> Table:
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        style = _STYLES[finding.level.value]
        text = Text(_sentence(finding))
        if finding.remedy:
            text.append(f"\n-> {finding.remedy}", style="italic")
        table.add_row(Text(finding.level.value, style=style), finding.subject.value, text)
    return table
