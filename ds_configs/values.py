"""What is done to the nested values of a configuration: changes by dotted keys, and environment variables."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from epi_ds.errors import UserError

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
# The value of which the Hugging Face trainer says that it is to be filled.
_AUTO = "auto"


def changed(values: Mapping[str, Any], changes: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """Return values with changes, whose keys may be dotted; a mapping is merged into the section that is there.

    source  where the values are from, for messages

    Raises UserError where a change would make a section of a value, or the other way round.
    """
    result = dict(values)
    for key, change in changes.items():
        parts = str(key).split(".")
        if not all(parts):
            raise UserError(f"changes of {source} are at dotted keys such as zero_optimization.stage, got {key!r}")
        for part in reversed(parts):
            change = {part: change}
        result = _merged(result, change, path="", source=source)
    return result


def expanded(values: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """Return values with ``${NAME}`` in strings replaced by the environment variable. Raises UserError if it is unset.

    source  where the values are from, for messages
    """

    def expand(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: expand(f"{key}.{name}", nested) for name, nested in value.items()}
        if isinstance(value, list):
            return [expand(key, item) for item in value]
        if isinstance(value, str):
            return _VARIABLE.sub(lambda found: _variable(found[1], key=key, source=source), value)
        return value

    return {key: expand(key, value) for key, value in values.items()}


def auto_keys(values: Mapping[str, Any], *, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of what is still ``auto``."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from auto_keys(value, prefix=f"{prefix}{key}.")
        elif value == _AUTO:
            yield f"{prefix}{key}"


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any], *, path: str, source: str) -> dict[str, Any]:
    result = dict(values)
    for key, change in changes.items():
        old = result.get(key)
        if None not in (old, change) and isinstance(old, Mapping) != isinstance(change, Mapping):
            kind = "section" if isinstance(old, Mapping) else "value"
            raise UserError(f"{path}{key} is a {kind} in {source}, and cannot become {change!r}")
        if isinstance(change, Mapping):
            change = _merged(old or {}, change, path=f"{path}{key}.", source=source)
        result[key] = change
    return result


def _variable(name: str, *, key: str, source: str) -> str:
    value = os.environ.get(name)
    if not value:
        # An empty one would be the folder that the run happens to be in.
        example = "/a/folder/on/a/local/disk" if key.endswith("nvme_path") else "..."
        raise UserError(
            f"{key} of {source} is read from the environment variable {name}, which is not set; export {name}={example}"
        )
    return value
