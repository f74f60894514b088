"""A trainer's ``checkpoint-N``: a tag of DeepSpeed's, and beside it what the trainer writes after it.

The tag is whole before the trainer has written its random states and ``trainer_state.json``, so the folder is a
checkpoint only with a manifest of its own, over everything in it. All functions are for one rank, once the others
have written.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from epi_ds.checkpoint.catalog import INCOMPLETE, leftovers_in, remove
from epi_ds.checkpoint.deepspeed_files import is_tag_name
from epi_ds.checkpoint.digest import records_of
from epi_ds.checkpoint.durable import sync_file, sync_folder
from epi_ds.checkpoint.manifest import FOLDER, PATH, Kind, Manifest, read_manifest, write_manifest
from epi_ds.checkpoint.run import FILE as RUN_FILE
from epi_ds.checkpoint.saving import now
from epi_ds.checkpoint.tag import newest_in
from epi_ds.errors import CheckpointError

logger = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)$")
# What a trainer writes last.
TRAINER_STATE = "trainer_state.json"


def commit_trainer_folder(folder: Path) -> Manifest:
    """Make a trainer's folder a checkpoint; return its manifest. Raises CheckpointError without a whole tag in it."""
    tag = newest_in(folder)
    inner = tag.manifest
    if inner is None:
        raise CheckpointError(str(tag.problem))
    # The tag's own files were read when it was saved.
    records = {f"{tag.path.name}/{name}": record for name, record in inner.files.items()}
    found = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    others = [name for name in found if name not in records and name != PATH]
    for name in others:
        sync_file(folder / name)
    for place in {(folder / name).parent for name in others}:
        sync_folder(place)
    files = {**records, **records_of(folder, others)}
    manifest = inner.model_copy(update={"kind": Kind.TRAINER, "saved_at": now(), "files": files})
    write_manifest(folder, manifest)
    sync_folder(folder.parent)
    return manifest


def set_aside_incomplete(output: Path) -> list[Path]:
    """Rename what an interrupted save left of a ``checkpoint-N``, so that no trainer resumes from it.

    Checkpoints that were saved without us are whole without a manifest, and are left alone.
    """
    renamed = []
    ours = (output / RUN_FILE).exists()
    for folder in sorted(output.glob("checkpoint-*")):
        if not _NAME.search(folder.name) or not folder.is_dir() or _has_manifest(folder):
            continue
        # Cut off before the tag: nothing of it is there, nor what is written last.
        began_only = (
            ours
            and not (folder / TRAINER_STATE).exists()
            and not any(is_tag_name(path.stem) for path in folder.iterdir())
        )
        if began_only or leftovers_in(folder) or any(folder.glob(f"*/{FOLDER}")):
            target = folder.with_name(folder.name + INCOMPLETE)
            if target.exists():
                remove(target)
            folder.rename(target)
            renamed.append(target)
    return renamed


def _has_manifest(folder: Path) -> bool:
    try:
        return read_manifest(folder) is not None
    except CheckpointError:
        # Damaged: a resume from it says so.
        return True
