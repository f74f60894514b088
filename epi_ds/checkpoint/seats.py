"""Which of this process's engines is which in a folder that several of them save in.

[Note: engines] An actor and a critic, say, may save in one folder under tags of their own. The process holds it for
all its engines (see [Note: fence] in run.py), and each has a number there, which its manifests carry: retention, and a
load of the newest, look at an engine's own tags only. The first is 0, which is also what a manifest of an earlier
release means. An engine that loads a tag goes on under the tag's number. One that begins anew gets the lowest that no
other engine of the process has; where tags of several lie there already, the lowest that none of those has either,
since one of them may be loaded later. A number is free again when its engine is destroyed, or is gone.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

# By folder, resolved, and number.
_seats: dict[Path, dict[int, weakref.ref[Any]]] = {}


def free_number(folder: Path, owner: Any, *, wanted: int | None, there: Iterable[int]) -> int:
    """Return the number that an engine has in a folder, or is to get. See [Note: engines].

    wanted  of the tag that it goes on from, if any
    there   the numbers of the tags that lie in the folder
    """
    seats = {number: seat() for number, seat in _seats.get(folder, {}).items()}
    own = next((number for number, holder in seats.items() if holder is owner), None)
    if own is not None:
        return own
    taken = {number for number, holder in seats.items() if holder is not None}
    if wanted is not None and wanted not in taken:
        return wanted
    tags = set(there)
    return next(number for number in count() if number not in taken | (tags if len(tags) > 1 else set()))


def take_seat(folder: Path, owner: Any, number: int) -> None:
    """Note that an engine has a number in a folder."""
    _seats.setdefault(folder, {})[number] = weakref.ref(owner)


def leave_seats(owner: Any) -> None:
    """Note that an engine saves nothing any more."""
    for seats in _seats.values():
        for number in [number for number, seat in seats.items() if seat() is owner]:
            del seats[number]
