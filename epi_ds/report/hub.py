"""Push the folder of a model to the Hugging Face hub, and say in one message what is in the way."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

from epi_ds.data.hub import is_hub_id
from epi_ds.errors import RemedyError, UserError

# What the hub's library speaks HTTP with depends on its release: its errors are the base of the hub's own.
_OF_THE_NETWORK: Any = HfHubHTTPError.__bases__
# The hub writes it into every repository.
_OF_THE_HUB = ".gitattributes"
_SHOWN = 5


class Pushed(NamedTuple):
    """Where a model is now."""

    url: str
    num_files: int
    """That were sent; others were there already."""


def token_of(file: Path | None) -> str:
    """Return the token to push with: that in a file, else the one in ``HF_TOKEN`` or of ``hf auth login``.

    Raises UserError where there is none.
    """
    if file is None:
        if found := get_token():
            return found
        raise UserError("there is no token of the hub; log in by `hf auth login`, set HF_TOKEN, or give --token-file")
    try:
        lines = file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--token-file {file} cannot be read ({error}); give a file that holds a token") from error
    if len(lines) != 1:
        raise UserError(f"--token-file {file} is to hold a token and nothing else, and it has {len(lines)} words")
    return lines[0]


def check_repo(repo: str) -> None:
    """Raise UserError for what is no name of a repository with its owner."""
    if "/" not in repo or not is_hub_id(repo):
        raise _no_repo(repo)


def push_folder(folder: Path, repo: str, *, token: str, private: bool, overwrite: bool, message: str) -> Pushed:
    """Put the files of a folder into a repository of models, which is made where there is none.

    private    whether it is made for those alone who may see it
    overwrite  whether a repository that holds something else is to hold this; its history keeps what it held

    What an interrupted push has sent is not sent again. Raises UserError for a token that may not, and for a repository
    that holds something else or is public against ``private``; and RemedyError where the hub cannot be reached.
    """
    api = HfApi(token=token)
    missing: list[str]
    others: list[str]
    with _told(repo):
        info = _info_of(api, repo)
        if info is None:
            # Without, as its owner has it by default.
            api.create_repo(repo, private=private or None)
            missing, others = sorted(path.name for path in folder.iterdir()), []
        else:
            if private and not info.private:
                raise UserError(
                    f"{repo} exists and is public, and --private is for one that is made now; make it private on the "
                    "hub, or give another name"
                )
            missing, others = _compared(folder, info)
        if others and not overwrite:
            raise UserError(
                f"{repo} exists and holds something else ({_listed(others)}); give another name, or --overwrite to "
                "have it hold this model alone"
            )
        if missing or others:
            api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=message,
                delete_patterns="*" if others else None,
            )
    return Pushed(f"{api.endpoint}/{repo}", len(missing))


def _info_of(api: HfApi, repo: str) -> Any:
    try:
        return api.model_info(repo, files_metadata=True)
    except RepositoryNotFoundError:
        # There is none, or none that this token may see: then making it says so.
        return None


def _compared(folder: Path, info: Any) -> tuple[list[str], list[str]]:
    """Return the names of files that a repository lacks, and of those that are something else there."""
    held = {one.rfilename: one for one in info.siblings or () if one.rfilename != _OF_THE_HUB}
    own = {path.name: path for path in folder.iterdir()}
    same = {name for name, one in held.items() if name in own and _is_same(own[name], one)}
    return sorted(own.keys() - same), sorted(held.keys() - same)


def _is_same(path: Path, held: Any) -> bool:
    if held.size != path.stat().st_size:
        return False
    if held.lfs is not None:
        with path.open("rb") as file:
            return bool(hashlib.file_digest(file, "sha256").hexdigest() == held.lfs.sha256)
    content = path.read_bytes()
    # As git names what it keeps.
    return bool(hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == held.blob_id)


@contextmanager
def _told(repo: str) -> Iterator[None]:
    """Turn what the hub's library raises into one message with its remedy."""
    again = "run the command again, which sends what is missing"
    try:
        yield
    except UserError:
        raise
    except OfflineModeIsEnabled as error:
        raise RemedyError("HF_HUB_OFFLINE is set, so that nothing can be pushed; unset it") from error
    except HfHubHTTPError as error:
        raise _refused(repo, error) from error
    except HFValidationError as error:
        raise _no_repo(repo) from error
    except ValueError as error:
        # Its library has no type for a card whose front matter the hub refuses, and gives the reasons below each other.
        said = " ".join(str(error).split())
        if "README.md" in said:
            raise UserError(f"the hub does not take the card: {said}; correct it") from error
        raise RemedyError(
            f"the hub's answer is not understood ({said[:200]}); check HF_ENDPOINT and the network"
        ) from error
    except _OF_THE_NETWORK as error:
        raise RemedyError(f"the hub cannot be reached ({_first_of(error)}); check the network, and {again}") from error
    except RuntimeError as error:
        # A file that could not be sent; why is what it was raised from.
        if isinstance(error.__cause__, HfHubHTTPError):
            raise _refused(repo, error.__cause__) from error
        reason = f"{_first_of(error)} {_first_of(error.__cause__) if error.__cause__ else ''}".strip()
        raise RemedyError(f"the push to {repo} broke off ({reason}); {again}") from error


def _no_repo(repo: str) -> UserError:
    return UserError(f"{repo!r} is no repository of the hub; give OWNER/NAME, in letters, digits, '-', '_' and '.'")


def _refused(repo: str, error: HfHubHTTPError) -> UserError | RemedyError:
    said = error.server_message or _first_of(error)
    match error.response.status_code:
        case 401:
            return UserError(f"the hub does not know the token ({said}); log in anew by `hf auth login`")
        case 403 | 404:
            return UserError(
                f"the token may not write to {repo} ({said}); give one with write access to {repo.partition('/')[0]}, "
                "or another name"
            )
        case status:
            return RemedyError(f"the hub answered {status} to the push to {repo} ({said}); try again later")


def _first_of(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
