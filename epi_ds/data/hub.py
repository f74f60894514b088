"""Data sets of the Hugging Face hub: which of their files belong to a split, brought to this machine."""

from __future__ import annotations

import re
from pathlib import Path

from epi_ds.errors import RemedyError, UserError, nearest

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?$", re.ASCII)
# What datasets calls a file of a data set at one revision.
_URL = re.compile(r"hf://datasets/([^@]+)@([^/]+)/(.+)$")


def is_hub_id(name: str) -> bool:
    """Whether a name can be one of the hub's: at most one slash, and no character that is no part of one."""
    return _ID.match(name) is not None


def files_of(name: str, *, subset: str | None, split: str) -> tuple[Path, ...]:
    """Return the files of one split of a data set, downloaded where they are not here yet.

    They are read by us, as they were written, and not by ``datasets``, which guesses types.

    Raises UserError for a data set, a subset or a split that does not exist, and RemedyError where the hub cannot be
    reached, which another try may mend.
    """
    from datasets import load_dataset_builder
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
    from huggingface_hub import hf_hub_download

    try:
        builder = load_dataset_builder(name, name=subset)
    except (DatasetNotFoundError, DataFilesNotFoundError) as error:
        raise UserError(f"{name} is neither a file here nor a data set of the hub: {error}") from error
    except ValueError as error:
        raise UserError(f"{name}, subset {subset}: {error}") from error
    except OSError as error:
        raise RemedyError(_unreachable(name, error)) from error
    found = builder.config.data_files or {}
    wanted = split.partition("[")[0]
    if wanted not in found:
        raise UserError(
            f"{name} has no split {wanted!r}{nearest(wanted, found)}; there are {', '.join(map(str, found))}"
        )
    files = []
    try:
        for url in map(str, found[wanted]):
            place = _URL.match(url)
            if place is None:
                raise UserError(f"{name}: the file {url} lies outside of the hub; fetch it, and give its path")
            repo, revision, file = place.groups()
            files.append(Path(hf_hub_download(repo, file, repo_type="dataset", revision=revision)))
    except OSError as error:
        raise RemedyError(_unreachable(name, error)) from error
    return tuple(files)


def _unreachable(name: str, error: Exception) -> str:
    return (
        f"{name} is no file here, and the hub cannot be reached ({type(error).__name__}: {error}); check the path, or "
        "the network, or fetch the data set where there is one and give its files"
    )
