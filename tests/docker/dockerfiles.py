"""What a Dockerfile says, line by line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))


class Instruction(NamedTuple):
    """One instruction, with its continued lines in one."""

    name: str
    arguments: str


def instructions(dockerfile: Path) -> list[Instruction]:
    """Return what a Dockerfile does, without its comments."""
    lines = [line for line in dockerfile.read_text().splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines()]


def all_of(dockerfile: Path, name: str) -> list[str]:
    """Return the arguments of every instruction of one name."""
    return [instruction.arguments for instruction in instructions(dockerfile) if instruction.name == name]


def copied(dockerfile: Path) -> list[str]:
    """Return the files and folders of the repository that an image gets."""
    return [source for copy in all_of(dockerfile, "COPY") for source in copy.split()[:-1]]
