"""Python and the libraries, against the ranges that the installed epi-ds asks for."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from epi_ds.doctor.finding import Finding, Level, Subject

# Those whose versions are worth reading; all others are looked at too.
_SHOWN = ("torch", "deepspeed", "transformers", "accelerate", "trl", "datasets", "safetensors")


def software() -> list[Finding]:
    """Compare this environment with what the installed distribution declares."""
    found = importlib.metadata.distribution("epi-ds")
    return compared(found.requires or [], python=found.metadata["Requires-Python"] or "")


def compared(requirements: Iterable[str], *, python: str) -> list[Finding]:
    """Compare installed versions with requirements as a distribution writes them, and Python's with a range."""
    shown, wrong = [f"python {platform.python_version()}"], []
    if not SpecifierSet(python).contains(platform.python_version(), prereleases=True):
        wrong.append(_outside("python", platform.python_version(), python, f"make an environment of python {python}"))
    for requirement in map(Requirement, requirements):
        # Those of an extra are asked for by its name only.
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        install = f"pip install '{requirement.name}{requirement.specifier}'"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(Finding(Level.FAIL, Subject.SOFTWARE, f"{requirement.name} is not installed", install))
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(_outside(requirement.name, version, str(requirement.specifier), install))
        elif requirement.name in _SHOWN:
            shown.append(f"{requirement.name} {version}")
    return [*wrong, Finding(Level.OK, Subject.SOFTWARE, ", ".join(shown))]


def _outside(name: str, version: str, wanted: str, remedy: str) -> Finding:
    return Finding(Level.FAIL, Subject.SOFTWARE, f"{name} {version}, but epi-ds needs {wanted}", remedy)
