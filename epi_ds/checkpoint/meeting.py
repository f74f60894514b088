"""Ranks meet before what all of them have to call, such as a save, and those that do not come are named.

[Note: meeting] A script that calls ``save_checkpoint``, or ``engine.epi.mask``, on one rank alone (``if rank == 0``)
leaves that rank in a collective that no other comes to. The others are in one of the next step, or have ended, so that
all that anybody hears is a time-out, or that a connection was closed. Ranks therefore first write into the store by
which their process group was made that they are there, and nothing goes over the group until all are. Whoever waits
sees who is missing, and a rank that ends leaves word of that. A meeting takes about 0.1 ms for each rank, since one
store answers all of them in turn (0.1 ms at 2 ranks, 0.2 at 4, 1 to 1.5 at 16; loopback, 2 cores): nothing beside a
save, and too much for what a thousand ranks call for every parameter.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from epi_ds.errors import LostRankError

logger = logging.getLogger(__name__)

# Between two looks at who is missing.
_SLICE = timedelta(seconds=1)
# A warning says who is missing, long before the time-out: ranks may be late for good reasons.
_WARNS_AFTER_SECONDS = 60.0
# The store of a rank that has ended may be gone too, and takes its time to notice.
_LAST_WORD_SECONDS = 2.0

# In a message.
_MOST_NAMED = 16

# How often this process has come to each meeting. The same on all ranks, where all come.
_times: dict[str, int] = {}
_has_word: set[int] = set()


def leave_word() -> None:
    """Have this process say when it ends, to ranks that wait for it in `meet`."""
    store = distributed_c10d._get_default_store()
    if store is None or id(store) in _has_word:
        return
    _has_word.add(id(store))
    atexit.register(_say_ended, store, dist.get_rank())


def _say_ended(store: Any, rank: int) -> None:
    def say() -> None:
        with suppress(RuntimeError):
            store.set(_ended(rank), "1")

    # Whatever becomes of it, this process ends.
    with suppress(RuntimeError):
        thread = threading.Thread(target=say, daemon=True)
        thread.start()
        thread.join(_LAST_WORD_SECONDS)


def meet(what: str) -> None:
    """Wait until every rank has come, as often as this one, to what all of them have to call. Collective.

    Raises LostRankError, with the ranks that did not, where one of them has ended, or the time-out of the process group
    is over. See [Note: meeting].
    """
    store = distributed_c10d._get_default_store()
    if store is None or dist.get_world_size() == 1:
        # A group of MPI has none.
        return
    number = _times[what] = _times.get(what, 0) + 1
    everyone = f"epi_ds/{what}/{number}/everyone"
    started, limit, is_told = time.monotonic(), _timeout_seconds(), False
    try:
        store.set(_place(what, dist.get_rank()), str(number))
        if store.add(f"epi_ds/{what}/{number}/come", 1) == dist.get_world_size():
            store.set(everyone, "1")
            # All have left the one before.
            _forget(store, what, number - 1)
        while not _comes(store, everyone):
            absent = _absent(store, what, number)
            if not absent:
                # The last one has come, and is about to say so.
                continue
            waited = time.monotonic() - started
            if any(store.check([_ended(rank)]) for rank in absent):
                raise LostRankError(_explained(what, absent, "and will not, because a rank has ended"))
            if waited > _WARNS_AFTER_SECONDS and not is_told and _speaks(absent):
                is_told = True
                logger.warning("rank %d: %s", dist.get_rank(), _explained(what, absent, f"within {waited:.0f} s"))
            if waited > limit:
                raise LostRankError(_explained(what, absent, f"within {limit:.0f} s"))
    except dist.DistNetworkError as error:
        raise LostRankError(
            f"{what}: the rank that keeps the store of the process group has ended ({error})"
        ) from error


def _forget(store: Any, what: str, number: int) -> None:
    """Remove a meeting that all have left: the store would grow with every one."""
    if number:
        for key in ("come", "everyone"):
            store.delete_key(f"epi_ds/{what}/{number}/{key}")


def _comes(store: Any, key: str) -> bool:
    """Whether a key is there, or comes within a slice of time."""
    try:
        store.wait([key], _SLICE)
    except dist.DistNetworkError:
        raise
    except RuntimeError:
        # Some stores have no type for it.
        return bool(store.check([key]))
    return True


def _absent(store: Any, what: str, number: int) -> list[int]:
    """Return the ranks that have not come to a meeting as often as this one."""

    def times(rank: int) -> int:
        key = _place(what, rank)
        return int(store.get(key)) if store.check([key]) else 0

    return [rank for rank in range(dist.get_world_size()) if times(rank) < number]


def _speaks(absent: list[int]) -> bool:
    """Whether this rank is the one of those that wait who says so."""
    return dist.get_rank() == next(rank for rank in range(dist.get_world_size()) if rank not in absent)


def _explained(what: str, absent: list[int], when: str) -> str:
    present = [rank for rank in range(dist.get_world_size()) if rank not in absent]
    return (
        f"{what} is for all ranks together, and {_named(absent)} not called it {when} ({_named(present)}). Call it on "
        "every rank, outside of what one rank does alone (if rank == 0); where every rank does call it, look at what "
        "those died of or wait for"
    )


def _named(ranks: list[int]) -> str:
    """Name ranks, of many the first ones."""
    if len(ranks) == 1:
        return f"rank {ranks[0]} has"
    more = f" and {len(ranks) - _MOST_NAMED} more" if len(ranks) > _MOST_NAMED else ""
    return f"ranks {', '.join(map(str, ranks[:_MOST_NAMED]))}{more} have"


def _place(what: str, rank: int) -> str:
    return f"epi_ds/{what}/rank/{rank}"


def _ended(rank: int) -> str:
    return f"epi_ds/ended/{rank}"


def _timeout_seconds() -> float:
    """Return how long the default process group waits for a rank."""
    group = distributed_c10d._get_default_group()
    backend = group._get_backend(torch.device(distributed_c10d._get_object_coll_device(group)))
    timeout: timedelta = backend.options._timeout
    return timeout.total_seconds()
