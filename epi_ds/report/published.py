"""What of a run may be told to everybody: its settings without secrets, and without where things lie on a machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

# Of arguments and of whoever adds more; not `eos_token`.
_SECRET_KEY = re.compile(r"(hub_token|api_key|access_token|password|secret)$", re.IGNORECASE)
# As the hub and other services write theirs.
_SECRET = re.compile(r"\b(hf_|sk-|ghp_|github_pat_|AKIA)[A-Za-z0-9_-]{12,}")
# Inside of a longer text; an address of the web has a colon before its slashes.
_PATH = re.compile(r"(?:^|(?<=[\s=,'\"(\[]))(?:~[\w.-]*|\.\.)?/(?!/)[^\s,'\"\])]+")
_LEFT_OUT = "(left out)"


def is_secret(key: str) -> bool:
    """Whether the value of a setting is nobody else's business, by its name."""
    return _SECRET_KEY.search(key) is not None


def published(value: Any) -> Any:
    """Return a setting, or settings, as they may be told: absolute paths are file names, and secrets are left out.

    Paths that begin at a home or lead out of the folder are taken for absolute ones.
    """
    if isinstance(value, Mapping):
        return {name: published(part) for name, part in value.items() if not is_secret(str(name))}
    if isinstance(value, (list, tuple)):
        return [published(part) for part in value]
    return _told(value) if isinstance(value, str) else value


def _told(text: str) -> str:
    text = _SECRET.sub(_LEFT_OUT, text)
    if text.startswith(("/", "~")) or ".." in PurePosixPath(text).parts:
        return _name_of(text)
    return _PATH.sub(lambda match: _name_of(match[0]), text)


def _name_of(path: str) -> str:
    return PurePosixPath(path).name or _LEFT_OUT


def sources_in(data: Any) -> list[Mapping[str, Any]]:
    """Return the sources of a stage, or of what is kept, as they stand in a recipe."""
    if data is None:
        return []
    return list(data) if isinstance(data, (list, tuple)) else [data]


def source_name(source: Mapping[str, Any]) -> str:
    """Return what a source of rows may be called: its skill, pattern, file or id."""
    return str(published(source.get("skill") or source.get("glob") or source.get("path") or ""))
