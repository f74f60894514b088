"""Which checkpoints a folder holds, and which of them to resume from.

[Note: names] A checkpoint is written under ``NAME.incomplete`` and gets its name when its manifest is in it. One that
is being replaced waits as ``NAME.replaced`` for that moment, and one that is being removed ends as ``NAME.removed``.
What a killed process leaves under such names is put right by `clean_up` when a run takes the folder over.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from epi_ds.checkpoint.deepspeed_files import LATEST, is_states_file, is_tag_name, is_universal
from epi_ds.checkpoint.durable import sync_folder
from epi_ds.checkpoint.manifest import FOLDER, PATH, Manifest, read_manifest, remove_manifest
from epi_ds.errors import CheckpointError, UserError

logger = logging.getLogger(__name__)

INCOMPLETE, REPLACED, REMOVED = ".incomplete", ".replaced", ".removed"
_STEP = re.compile(r"step:(\d+)$")
_TRAINERS_NAME = re.compile(r"checkpoint-\d+$")


class Checkpoint(NamedTuple):
    """A folder that is a checkpoint, or claims to be one."""

    path: Path
    manifest: Manifest | None
    """What it says of itself; None where the manifest is missing or unreadable."""
    problem: str | None
    """Why it is no checkpoint to resume from, as far as that can be said without reading the other files."""

    is_plain: bool = False
    """Whether it has no manifest at all: DeepSpeed wrote it without us, or we did not write it to its end."""

    @property
    def step(self) -> int:
        """Steps before the save; -1 where that is not known."""
        return -1 if self.manifest is None else self.manifest.step


def open_checkpoint(folder: Path) -> Checkpoint:
    """Look at one folder."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return Checkpoint(folder, None, str(error))
    if manifest is None:
        problem = f"{folder / PATH} is missing: the checkpoint was saved without isolation, or not to its end"
        if is_universal(folder):
            problem = (
                f"{folder} is in DeepSpeed's universal format, which holds no importance and no masks. Load the "
                "checkpoint that it was converted from, with any number of ranks; or, to begin isolation anew, name it "
                "(load_checkpoint(folder, tag=...)) with missing_state: fresh, and "
                '"checkpoint": {"load_universal": true} in the DeepSpeed configuration'
            )
        return Checkpoint(folder, None, problem, is_plain=True)
    return Checkpoint(folder, manifest, None)


def checkpoints_in(folder: Path) -> list[Checkpoint]:
    """Return the checkpoints that lie in a folder, the newest last; those without a known step come first.

    A later process's is newer than an earlier one's, whatever their steps: it may have gone back to an older one.
    Leftovers under the names of [Note: names] are left out.
    """
    found = [open_checkpoint(path) for path in _folders_in(folder) if not _is_leftover(path) and _claims_to_be(path)]
    return sorted(found, key=_age)


def _age(one: Checkpoint) -> tuple[int, int, str]:
    return (0, -1, "") if one.manifest is None else (one.manifest.incarnation, one.step, one.manifest.saved_at)


def leftovers_in(folder: Path) -> list[Path]:
    """Return what killed processes left in a folder."""
    return [path for path in _folders_in(folder) if _is_leftover(path)]


def _folders_in(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from sorted(path for path in folder.iterdir() if path.is_dir())


def _is_leftover(path: Path) -> bool:
    if path.suffix not in (INCOMPLETE, REPLACED, REMOVED):
        return False
    # Named as DeepSpeed and trainers do by themselves, or ours by what is in it: anybody may call a folder so.
    return is_tag_name(path.stem) or bool(_TRAINERS_NAME.match(path.stem)) or _claims_to_be(path)


def _claims_to_be(path: Path) -> bool:
    # Others' folders may be closed to us, or gone by now.
    with suppress(OSError):
        return (path / FOLDER).is_dir() or any(is_states_file(file.name) for file in path.iterdir())
    return False


def of_engine(folder: Path, checkpoints: Sequence[Checkpoint], engine: int | None) -> list[Checkpoint]:
    """Return those checkpoints of a folder that are of one engine's, or unreadable. See [Note: engines] in seats.py.

    engine  its number; None where it is not known, which is an error (UserError) where several have saved there
    """
    newest = {one.manifest.engine: one.path.name for one in checkpoints if one.manifest is not None}
    if engine is None and len(newest) > 1:
        raise UserError(
            f"{folder} holds checkpoints of {len(newest)} engines that saved there (the newest of each: "
            f"{', '.join(newest.values())}), and this one has neither saved there nor loaded any of them; name its "
            "own by load_checkpoint(folder, tag=...)"
        )
    return [one for one in checkpoints if one.manifest is None or engine in (None, one.manifest.engine)]


def named(folder: Path, name: str, *, engine: int | None = None) -> Checkpoint:
    """Return the checkpoint of a name, or of ``step:N``. Raises UserError where there is none.

    engine  by step, see `of_engine`
    """
    match = _STEP.match(name)
    if match is None:
        if not (folder / name).is_dir():
            known = ", ".join(one.path.name for one in checkpoints_in(folder)) or "none"
            raise UserError(f"{folder} holds no checkpoint {name!r}; there are: {known}")
        return open_checkpoint(folder / name)
    step = int(match.group(1))
    own = of_engine(folder, checkpoints_in(folder), engine)
    known_steps = {one.step: one for one in own if one.manifest is not None}
    if step not in known_steps:
        steps = ", ".join(str(known) for known in sorted(known_steps)) or "none"
        raise UserError(f"{folder} holds no complete checkpoint of step {step}; there are steps {steps}")
    return known_steps[step]


class Choice(NamedTuple):
    """What to resume from, and what was passed over for it."""

    checkpoint: Checkpoint
    skipped: tuple[str, ...]
    """Why newer ones, or such as may be newer, were not taken."""


def newest_valid(
    folder: Path,
    checkpoints: Sequence[Checkpoint],
    *,
    problems_of: Callable[[Checkpoint], list[str]],
    was_saved: bool,
) -> Choice | None:
    """Return the newest checkpoint of a folder in which nothing is wrong; None where none was ever completed there.

    checkpoints  those in the folder, the newest last
    problems_of  reads the files of one whose manifest is whole
    was_saved    whether ``latest`` says that there was one

    Raises CheckpointError where there are checkpoints and none is whole, or ``latest`` names one: a run that had got
    somewhere must not begin at step 0 because of a damaged disk.
    """
    # Those without a readable manifest may be newer than any other: nobody knows.
    skipped = [f"{one.path.name}: {one.problem}" for one in checkpoints if one.problem is not None]
    for candidate in reversed([one for one in checkpoints if one.problem is None]):
        problems = problems_of(candidate)
        if not problems:
            return Choice(candidate, tuple(skipped))
        skipped.append(f"{candidate.path.name}: {problems[0]}" + _more(problems))
    remedy = "Restore one of them from a copy, or give another folder to begin at step 0"
    if skipped:
        raise CheckpointError(
            f"no checkpoint in {folder} can be resumed from:\n  " + "\n  ".join(skipped) + f"\n{remedy}"
        )
    if was_saved:
        raise CheckpointError(f"{folder / LATEST} says that a checkpoint was saved there, and there is none. {remedy}")
    return None


def _more(problems: list[str]) -> str:
    return f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""


# --- changing what there is ---


def put_in_place(incomplete: Path) -> Path:
    """Give a checkpoint whose manifest is written its name; replace what has that name. See [Note: names]."""
    target = incomplete.with_suffix("")
    replaced = target.with_name(target.name + REPLACED)
    if target.exists():
        target.rename(replaced)
    try:
        incomplete.rename(target)
    except OSError:
        if replaced.exists():
            replaced.rename(target)
        raise
    sync_folder(target.parent)
    if replaced.exists():
        remove(replaced)
    return target


def remove(folder: Path) -> bool:
    """Remove a checkpoint so that no half of it is ever taken for one; return whether all of it is gone.

    Warns where files cannot be removed.
    """
    doomed = folder
    try:
        if folder.suffix != REMOVED:
            doomed = folder.with_name(folder.name + REMOVED)
            if doomed.exists():
                _delete(doomed)
            remove_manifest(folder)
            folder.rename(doomed)
        _delete(doomed)
    except OSError as error:
        logger.warning("%s could not be removed (%s); it is left for the next time", doomed, error)
        return False
    return True


def _delete(folder: Path) -> None:
    """Delete a folder, what shows that it is ours last: otherwise nobody would finish a deletion that was killed."""
    for path in folder.iterdir():
        if path.is_dir() and path.name != FOLDER:
            shutil.rmtree(path)
        elif not path.is_dir():
            path.unlink()
    shutil.rmtree(folder)


def clean_up(folder: Path) -> list[str]:
    """Put right what killed processes left in a folder; return a sentence about each.

    A trainer's checkpoint that lacks its manifest, and has a whole tag in it, stays until there is a whole one.
    """
    done = []
    has_whole = any(one.problem is None for one in checkpoints_in(folder))
    for path in leftovers_in(folder):
        name = path.with_suffix("")
        if path.suffix == INCOMPLETE and open_checkpoint(path).problem is None:
            put_in_place(path)
            done.append(f"{name} was complete but for its name")
        elif path.suffix == REPLACED and not name.exists() and not name.with_name(name.name + INCOMPLETE).exists():
            path.rename(name)
            done.append(f"{name} was to be replaced, and the new one never came to be complete")
        elif path.suffix == INCOMPLETE and not has_whole and any(one.problem is None for one in checkpoints_in(path)):
            done.append(f"{path} lacks its manifest, and stays until a newer checkpoint is whole: a tag in it is")
        elif path.exists():
            remove(path)
            done.append(f"{path} was left by a save or a removal that did not end")
    return done
