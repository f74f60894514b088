"""Which releases a run is trained with."""

from __future__ import annotations

import importlib.metadata

import epi_ds

_PACKAGES = ("torch", "deepspeed", "transformers", "trl", "datasets")


def installed_versions() -> dict[str, str]:
    """Return the releases of this package and of those that decide what a run does, by name."""
    return {"epi_ds": epi_ds.__version__, **{name: importlib.metadata.version(name) for name in _PACKAGES}}
