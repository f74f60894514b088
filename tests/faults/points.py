"""Where a rank may be killed while a tag is saved, by name. Nothing in the library knows of them."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

PointName = Literal[
    "before the folder is made",
    "within the model states",
    "after the model states",
    "within the optimizer states",
    "after the optimizer states",
    "within the isolation shard",
    "after the isolation shard",
    "before files are synced",
    "before ranks agree",
    "before the manifest is written",
    "within the manifest",
    "before the tag has its name",
    "after the tag has its name",
    "before latest is written",
    "after latest is written",
]
POINTS: tuple[PointName, ...] = get_args(PointName)
# Rank 0 does these for all; another rank is killed while it waits.
OF_RANK_0 = POINTS[POINTS.index("before the manifest is written") :]
# The tag is whole from here on.
COMMITTED = POINTS[POINTS.index("after the tag has its name") :]


def die() -> None:
    """What kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(point: PointName) -> None:
    """Have this process killed when it comes to a point of its next save."""
    import torch

    from epi_ds.checkpoint import durable, saving, store

    if point == "before the folder is made":
        _before(saving.TagWriter, "__init__")
    elif point == "within the model states":
        _within(torch, "save", call=1)
    elif point == "after the model states":
        _after(torch, "save", call=1)
    elif point == "within the optimizer states":
        _within(torch, "save", call=2)
    elif point == "after the optimizer states":
        _after(torch, "save", call=2)
    elif point == "within the isolation shard":
        _truncate(store, "write_shard")
    elif point == "after the isolation shard":
        _after(store, "write_shard")
    elif point == "before files are synced":
        _before(saving, "sync_file")
    elif point == "before ranks agree":
        _before(saving.TagWriter, "_results")
    elif os.environ["RANK"] != "0":
        # The third thing that rank 0 does for all: the look at the space, the folder, and then the commit.
        _before(saving, "on_first_rank", call=3)
    elif point == "before the manifest is written":
        _before(saving, "write_manifest")
    elif point == "within the manifest":
        _before(durable.os, "replace")
    elif point == "before the tag has its name":
        _before(saving, "put_in_place")
    elif point == "after the tag has its name":
        _after(saving, "put_in_place")
    elif point == "before latest is written":
        _before(saving, "write_text")
    elif point == "after latest is written":
        _after(saving, "write_text")


def _wrap(owner: Any, name: str, call: int, run: Callable[..., Any]) -> None:
    """Have ``run`` called in place of a function, the ``call``-th time."""
    original, calls = getattr(owner, name), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return run(original, *args, **kwargs) if calls[0] == call else original(*args, **kwargs)

    setattr(owner, name, wrapped)


def _before(owner: Any, name: str, *, call: int = 1) -> None:
    _wrap(owner, name, call, lambda original, *args, **kwargs: die())


def _after(owner: Any, name: str, *, call: int = 1) -> None:
    def run(original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        die()

    _wrap(owner, name, call, run)


def _within(owner: Any, name: str, *, call: int) -> None:
    """Half a file of torch's, and then nothing."""

    def run(original: Callable[..., Any], content: Any, path: Any, **kwargs: Any) -> None:
        whole = io.BytesIO()
        original(content, whole, **kwargs)
        Path(path).write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
        die()

    _wrap(owner, name, call, run)


def _truncate(owner: Any, name: str) -> None:
    def run(original: Callable[..., Any], path: Path, *args: Any, **kwargs: Any) -> None:
        original(path, *args, **kwargs)
        path.write_bytes(path.read_bytes()[:200])
        die()

    _wrap(owner, name, 1, run)
