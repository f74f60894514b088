"""What the cells of Arrow's columns say, as they were written: its types are narrower and wider than Python's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow
import pyarrow.compute
from pyarrow import types

from epi_ds.data.reading.record import Number


def values_of(array: pyarrow.Array) -> list[Any]:
    """Return the cells of an array.

    A number of a float32 or float16 column is the shortest decimal that reads back to it: 0.1 was written, not
    0.10000000149. A decimal keeps its digits, and a time its nanoseconds. A struct lacks the keys that the table gave
    to all of them because one has it.

    Raises ArrowException, OverflowError or ValueError for a cell that Python has no value for.
    """
    kind = array.type
    if isinstance(array, pyarrow.ExtensionArray):
        return values_of(array.storage)
    if types.is_dictionary(kind):
        return values_of(array.dictionary_decode())
    if types.is_run_end_encoded(kind):
        return values_of(pyarrow.compute.run_end_decode(array))
    if types.is_struct(kind):
        return list(_structs(array))
    if types.is_map(kind):
        return list(_maps(array))
    if any(is_list(kind) for is_list in _LISTS):
        return list(_lists(array))
    read = next((read for is_kind, read in _LEAVES if is_kind(kind)), pyarrow.Array.to_pylist)
    return read(array)


_LISTS: tuple[Callable[[Any], bool], ...] = (
    types.is_list,
    types.is_large_list,
    types.is_fixed_size_list,
    types.is_list_view,
    types.is_large_list_view,
)


def _structs(array: pyarrow.StructArray) -> Iterator[dict[str, Any] | None]:
    names = [array.type.field(index).name for index in range(array.type.num_fields)]
    # Unlike `field`, it knows where the struct itself is null.
    columns = [values_of(column) for column in array.flatten()]
    for index, valid in enumerate(array.is_valid().to_pylist()):
        cells = ((name, column[index]) for name, column in zip(names, columns, strict=True))
        yield {name: cell for name, cell in cells if cell is not None} if valid else None


def _lists(array: pyarrow.Array) -> Iterator[list[Any] | None]:
    # Lists that are null have no length, and none of their values is among the others.
    parts = iter(values_of(array.flatten()))
    for length in pyarrow.compute.list_value_length(array).to_pylist():
        yield None if length is None else [next(parts) for _ in range(length)]


def _maps(array: pyarrow.MapArray) -> Iterator[dict[Any, Any] | None]:
    pair = pyarrow.struct([("key", array.type.key_type), ("value", array.type.item_type)])
    for pairs in values_of(array.cast(pyarrow.list_(pair))):
        yield None if pairs is None else {pair["key"]: pair.get("value") for pair in pairs}


def _narrow_floats(array: pyarrow.Array) -> list[Any]:
    # Both numpy types write themselves as the shortest decimal that reads back to them.
    values = array.to_numpy(zero_copy_only=False)
    narrow = values.astype("float32" if types.is_float32(array.type) else "float16")
    return [float(str(one)) if valid else None for one, valid in zip(narrow, array.is_valid().to_pylist(), strict=True)]


def _decimals(array: pyarrow.Array) -> list[Any]:
    # In full: Python writes small and large ones with an exponent that no column has.
    return [None if one is None else Number(f"{one:f}") for one in array.to_pylist()]


def _times_of_day(array: pyarrow.Array) -> list[Any]:
    # Python's have microseconds, and would drop the rest in silence.
    return array.cast(pyarrow.string()).to_pylist() if array.type.unit == "ns" else array.to_pylist()


_LEAVES: tuple[tuple[Callable[[Any], bool], Callable[[pyarrow.Array], list[Any]]], ...] = (
    (types.is_float16, _narrow_floats),
    (types.is_float32, _narrow_floats),
    (types.is_decimal, _decimals),
    (types.is_time64, _times_of_day),
)
