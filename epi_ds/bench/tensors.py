"""How many bytes of tensors are alive, and how many were at the worst moment of a call. Any device."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


def live_storages() -> dict[int, int]:
    """Return the size in bytes of every storage that a Python object refers to, by address."""
    gc.collect()
    found = {}
    for item in gc.get_objects():
        # isinstance() asks lazy objects of other libraries for their class, which loads things; type() does not.
        if issubclass(type(item), Tensor) and item.layout is torch.strided:
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


class _Allocations(TorchDispatchMode):
    """Follows every storage that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in given:
                    self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def peak_bytes(action: Callable[[], T]) -> tuple[T, int]:
    """Run ``action``; return its result and the most bytes that tensors made by it held at once."""
    with _Allocations() as allocations:
        result = action()
    return result, allocations.peak
