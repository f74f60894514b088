"""The bytes of a file, whatever compressed them: its first bytes say so, not its name."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from epi_ds.errors import UserError


def _zstd(stream: BinaryIO) -> BinaryIO:
    # Arrow reads it, and is installed with datasets; Python does so itself from 3.14 on.
    import pyarrow

    return cast(BinaryIO, pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, mode="r"), "zstd"))


_CODECS: Mapping[bytes, tuple[str, Callable[[BinaryIO], BinaryIO]]] = {
    b"\x1f\x8b": ("gzip", lambda stream: cast(BinaryIO, gzip.GzipFile(fileobj=stream))),
    b"\x28\xb5\x2f\xfd": ("zstd", _zstd),
}
_DAMAGES = (EOFError, OSError, zlib.error)


class Bytes(io.BufferedReader):
    """A buffered stream of a file's bytes, decompressed; damage found on the way is a UserError."""


class _Told(io.RawIOBase):
    """Turns what a codec raises for a cut or damaged file into one message."""

    def __init__(self, stream: BinaryIO, path: Path, codec: str) -> None:
        self._stream, self._path, self._codec = stream, path, codec

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            found = self._stream.read(len(buffer))
        except _DAMAGES as error:
            raise UserError(
                f"{self._path} is cut or damaged: its {self._codec} data cannot be read to the end ({error}); copy or "
                "compress it again"
            ) from error
        buffer[: len(found)] = found
        return len(found)


@contextmanager
def open_bytes(path: Path) -> Iterator[Bytes]:
    """Open a file and yield its bytes, decompressed. Raises UserError where it cannot be opened or is damaged."""
    try:
        stream = path.open("rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; check the path and its permissions") from error
    with stream:
        head = stream.read(8)
        stream.seek(0)
        for magic, (codec, opener) in _CODECS.items():
            if head.startswith(magic):
                yield Bytes(_Told(opener(stream), path, codec), buffer_size=1 << 20)
                return
        yield Bytes(cast(io.RawIOBase, stream), buffer_size=1 << 20)
