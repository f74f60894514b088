"""``epi-ds build-operators``."""

from __future__ import annotations

import typer


def build_operators() -> None:
    """Build DeepSpeed's operators for this machine, once, so that no rank has to."""
    from epi_ds.launch import operators

    operators.build_operators(typer.echo)
