"""DeepSpeed's checkpoint engine while a tag is being saved or loaded by us."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from epi_ds.checkpoint.saving import TagWriter


class _Guarded:
    """Stands before the engine's own while a tag is written: a file that fails does not leave the other ranks waiting.

    DeepSpeed writes on every rank for itself and then meets the others in a barrier; a rank that raises never gets
    there.
    """

    def __init__(self, engine: Any, writer: TagWriter) -> None:
        self._engine, self._writer = engine, writer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def save(self, state_dict: Any, path: str) -> None:
        """Write a file; the writer hears how it went."""
        self._writer.run(Path(path), lambda: self._engine.save(state_dict, path))


@contextmanager
def guarded(engine: Any, writer: TagWriter) -> Iterator[None]:
    """Within the context, files that DeepSpeed saves are the writer's."""
    own = engine.checkpoint_engine
    engine.checkpoint_engine = _Guarded(own, writer)
    try:
        yield
    finally:
        engine.checkpoint_engine = own
