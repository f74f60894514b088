"""``epi-ds --debug``: the traceback of an error whose message is all that is said otherwise."""

from __future__ import annotations

import logging

OPTION = "--debug"

# Of the package: its level is what the option sets, in every process that has it.
logger = logging.getLogger("epi_ds")


def log_everything(asked: bool) -> bool:
    """Set the package's level if ``--debug`` is given; return whether it is."""
    if asked:
        logger.setLevel(logging.DEBUG)
    return asked


def debug_options() -> list[str]:
    """Return what ranks of this command are to be given before their verb, so that they do as it does."""
    return [OPTION] if logger.isEnabledFor(logging.DEBUG) else []


def log_traceback() -> None:
    """Log where the error comes from that is being handled, with ``--debug``."""
    logger.debug("the error below comes from here", exc_info=True)
