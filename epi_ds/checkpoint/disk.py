"""A disk that is full, or cannot be written to, in words.

[Note: disk] A save that fails is told of by all ranks together, see saving.py, and training goes on. Everything else
that a run writes (metrics, the report, the exported model, a tracker's events) is written by one rank alone, which has
to say by itself what it met, and ends; the others lose it. What is our own is written within `writing`, which knows the
file. What libraries write is recognised by `disk_problem` where a rank ends, by the number of the error or, where a
library has no type for it, by its text.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from epi_ds.errors import CheckpointError, DiskError, RemedyError, UserError

# Of a disk, whatever is done to it. Others (no such file, no access) may be somebody's bug.
_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)
# What safetensors says of them, and torch.save of all of them. They have no types for it.
_SIGNS = (
    *(f"(os error {number})" for number in _NUMBERS),
    "PytorchStreamWriter failed writing file",
    "iostream error",
    "inline_container.cc",
)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise DiskError, which names the file and the remedy, where what is written within the block cannot be.

    path  of the file, or of the folder that files are written into
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or _is_of_disk(error):
            raise DiskError(_explained(path, error)) from error
        raise


def disk_problem(error: BaseException, *, place: Path) -> str | None:
    """Return what an error says of a disk, with the remedy; None where it says nothing.

    place  the folder that is written into, where the error names no file
    """
    for cause in (error, error.__cause__):
        # On all ranks it is the same kind of error, and on the one that met it this is its cause.
        if isinstance(cause, DiskError):
            return str(cause)
    if isinstance(error, UserError | RemedyError | CheckpointError) or not _is_of_disk(error):
        return None
    named = error.filename if isinstance(error, OSError) else None
    return _explained(Path(named) if isinstance(named, str) else place, error)


def _is_of_disk(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _NUMBERS
    return any(sign in str(error) for sign in _SIGNS)


def _explained(path: Path, error: BaseException) -> str:
    what = f"a file in {path}" if path.is_dir() else str(path)
    # Not with the name in it, which may be that of a temporary file.
    said = error.strerror if isinstance(error, OSError) else None
    said = said or str(error).partition("\n")[0]
    return f"{what} could not be written: {said}{_room_of(path)}. Make room there, or get access to it"


def _room_of(path: Path) -> str:
    """Say how much room is left where a file lies; nothing where that cannot be asked either."""
    with suppress(OSError):
        place = next(one for one in (path, *path.parents) if one.exists())
        return f"; its file system has {shutil.disk_usage(place).free / 1e9:.2f} GB free"
    return ""
