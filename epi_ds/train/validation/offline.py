"""Whether the hub can be reached, found out once: its client asks six times over half a minute, for every file anew."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from epi_ds.data.hub import is_hub_id

_SECONDS = 5.0
_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def stay_offline_without_hub(values: Mapping[str, Any]) -> None:
    """Tell the hub's client to use what is on this machine, where a recipe names something of the hub and it is away.

    Before anything imports that client, which reads its environment once. A proxy is not asked.
    """
    if any(_names_in(values)) and not any(os.environ.get(name) for name in _PROXIES) and not _is_reachable():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _names_in(values: Any) -> Iterator[str]:
    """Yield the values of keys called ``path`` that may be names of the hub."""
    if isinstance(values, Mapping):
        path = values.get("path")
        if isinstance(path, str) and is_hub_id(path) and not Path(path).exists():
            yield path
    if isinstance(values, (Mapping, list)):
        for inner in values.values() if isinstance(values, Mapping) else values:
            yield from _names_in(inner)


def _is_reachable() -> bool:
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        with socket.create_connection((endpoint.hostname or "", endpoint.port or 443), timeout=_SECONDS):
            return True
    except OSError:
        return False
