"""Walk a flat tensor in chunks, so that temporaries stay small whatever the partition's size."""

from __future__ import annotations

from collections.abc import Iterator

# Multiple of 8, so that a chunk begins at a byte of the mask; its temporaries stay within a few MB.
CHUNK_NUMEL = 1 << 20


def chunks(start: int, stop: int, numel: int = CHUNK_NUMEL) -> Iterator[tuple[int, int]]:
    """Yield the ``(start, stop)`` of the chunks of a range, cut at multiples of ``numel``."""
    while start < stop:
        end = min(stop, (start // numel + 1) * numel)
        yield start, end
        start = end
