"""What transformers and TRL refuse of a recipe's arguments, as one message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from epi_ds.errors import UserError


@contextmanager
def refused_by_libraries() -> Iterator[None]:
    """Turn the ValueErrors and TypeErrors by which libraries refuse arguments into UserErrors with their words.

    Only around their constructors, which check what they are given: later such an error may be anybody's.
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"the recipe's train section is refused by transformers or TRL: {error}") from error
