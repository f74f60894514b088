"""Checkpoints as files: what is whole, what is kept, whose they are, and what a killed process may leave behind."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.trainer_utils import rotate_checkpoints

from epi_ds.checkpoint.catalog import (
    Checkpoint,
    checkpoints_in,
    clean_up,
    leftovers_in,
    named,
    newest_valid,
    open_checkpoint,
    put_in_place,
    remove,
)
from epi_ds.checkpoint.digest import problems_of_files, record_of
from epi_ds.checkpoint.durable import write_json
from epi_ds.checkpoint.loading import newest_checkpoint, share_of
from epi_ds.checkpoint.manifest import FOLDER, PATH, read_manifest
from epi_ds.checkpoint.random_states import random_states, restore_random_states
from epi_ds.checkpoint.retention import Retention, prune, surplus
from epi_ds.checkpoint.run import FILE, check_trusted, is_own, read_run, take_over, why_not_ours
from epi_ds.checkpoint.slices import pieces_of, slice_numel
from epi_ds.checkpoint.trainer_folder import commit_trainer_folder, set_aside_incomplete
from epi_ds.errors import UserError
from tests.support.tags import change_manifest, flip_bit, make_checkpoint, manifest_of

# --- slices ---


@given(st.integers(1, 500), st.integers(1, 9), st.integers(1, 9))
def test_what_a_rank_needs_is_made_of_what_others_saved(numel: int, before: int, after: int) -> None:
    entries = list(range(numel))
    size = slice_numel(numel, before)
    saved = [entries[rank * size : (rank + 1) * size] for rank in range(before)]
    own = slice_numel(numel, after)
    for rank in range(after):
        start, stop = min(rank * own, numel), min((rank + 1) * own, numel)
        pieces = list(pieces_of(numel, world_size=before, start=start, stop=stop))
        found = [entry for piece in pieces for entry in saved[piece.rank][piece.start : piece.stop]]
        assert found == entries[start:stop]
        assert all(piece.numel > 0 for piece in pieces)
        assert [piece.offset for piece in pieces] == [
            sum(piece.numel for piece in pieces[:index]) for index in range(len(pieces))
        ]


# --- digests and manifests ---


def test_every_damage_to_a_file_is_named(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "a", step=1, files={"whole": "x" * 9, "short": "y" * 9, "flipped": "z" * 9})
    files = manifest_of(folder).files
    assert problems_of_files(folder, files) == []
    (folder / "short").write_text("y" * 8)
    flip_bit(folder / "flipped", at=0)
    (folder / "whole").unlink()
    assert problems_of_files(folder, files) == [
        f"{folder}/flipped is damaged: its checksum (xxh3_128) is not the saved one",
        f"{folder}/short has 8 bytes, and was saved with 9",
        f"{folder}/whole is missing",
    ]


@pytest.mark.parametrize("numel", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_a_digest_is_that_of_the_whole_content(tmp_path: Path, numel: int) -> None:
    import xxhash

    content = torch.randint(0, 256, (numel,), generator=torch.Generator().manual_seed(0)).to(torch.uint8).numpy()
    path = tmp_path / "file"
    path.write_bytes(content.tobytes())
    record = record_of(path)
    assert (record.num_bytes, record.xxh3_128) == (numel, xxhash.xxh3_128_hexdigest(content.tobytes()))


def test_no_flipped_bit_of_a_manifest_becomes_another_step(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "a", step=12)
    whole, path = manifest_of(folder), folder / PATH
    content = path.read_bytes()
    harmless = 0
    for at in range(len(content)):
        for bit in (0, 4):
            damaged = bytearray(content)
            damaged[at] ^= 1 << bit
            path.write_bytes(damaged)
            with contextlib.suppress(RuntimeError):
                # White space between the values; or it says the same.
                assert read_manifest(folder) == whole
                harmless += 1
    assert harmless < len(content)


def test_another_format_is_refused_with_what_reads_it(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "a", step=1)
    change_manifest(folder, lambda content: content.update(format_version=5))
    with pytest.raises(RuntimeError, match="version 5, and this release reads 4; resume with the epi_ds release"):
        read_manifest(folder)
    # The third format had no digest.
    write_json(folder / PATH, {"format_version": 3, "world_size": 2})
    with pytest.raises(RuntimeError, match="format version 3, and this release reads 4"):
        read_manifest(folder)
    for text in ("", "{", "[]", "null", '{"format_version": 4}', "\x00" * 50):
        (folder / PATH).write_text(text)
        with pytest.raises(RuntimeError, match="is damaged"):
            read_manifest(folder)


# --- choosing ---


def nothing_wrong(checkpoint: Checkpoint) -> list[str]:
    assert checkpoint.manifest is not None
    return problems_of_files(checkpoint.path, checkpoint.manifest.files)


def choice_in(folder: Path) -> tuple[str | None, tuple[str, ...]]:
    found = newest_valid(
        folder, checkpoints_in(folder), problems_of=nothing_wrong, was_saved=(folder / "latest").exists()
    )
    return (None, ()) if found is None else (found.checkpoint.path.name, found.skipped)


def test_the_newest_whole_one_is_chosen_by_its_step_not_by_its_name(tmp_path: Path) -> None:
    assert choice_in(tmp_path) == (None, ())
    assert choice_in(tmp_path / "absent") == (None, ())
    for name, step in (("b", 30), ("a", 100), ("c", 9)):
        make_checkpoint(tmp_path / name, step=step)
    (tmp_path / "logs").mkdir()
    (tmp_path / "latest").write_text("c")
    assert choice_in(tmp_path) == ("a", ())
    flip_bit(tmp_path / "a" / "weights")
    name, skipped = choice_in(tmp_path)
    assert name == "b"
    assert len(skipped) == 1
    assert "a: " in skipped[0]
    assert "weights is damaged" in skipped[0]
    (tmp_path / "b" / PATH).write_text("")
    assert choice_in(tmp_path)[0] == "c"
    shutil.rmtree(tmp_path / "c" / "epi")
    with pytest.raises(RuntimeError, match=r"no checkpoint in .* can be resumed from(.|\n)*weights is damaged"):
        choice_in(tmp_path)


def test_a_run_that_was_somewhere_does_not_begin_at_step_0(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("\x00\x00")
    with pytest.raises(RuntimeError, match="latest says that a checkpoint was saved there, and there is none"):
        choice_in(tmp_path)
    # Cut off while it was saved, and plain DeepSpeed's.
    (tmp_path / "latest").unlink()
    (tmp_path / "global_step3.incomplete" / "epi").mkdir(parents=True)
    assert choice_in(tmp_path) == (None, ())
    (tmp_path / "global_step2").mkdir()
    (tmp_path / "global_step2" / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    with pytest.raises(RuntimeError, match=f"global_step2: .*{PATH} is missing"):
        choice_in(tmp_path)
    assert open_checkpoint(tmp_path / "global_step2").is_plain


def test_a_checkpoint_can_be_asked_for(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "best", step=7)
    assert named(tmp_path, "best").path == named(tmp_path, "step:7").path == tmp_path / "best"
    with pytest.raises(UserError, match="no checkpoint 'worst'; there are: best"):
        named(tmp_path, "worst")
    with pytest.raises(UserError, match="no complete checkpoint of step 8; there are steps 7"):
        named(tmp_path, "step:8")


def test_files_are_shared_out_evenly(tmp_path: Path) -> None:
    sizes = {f"file{index}": "x" * size for index, size in enumerate((900, 500, 400, 300, 3, 2, 1))}
    files = manifest_of(make_checkpoint(tmp_path / "a", step=1, files=sizes)).files
    for world_size in (1, 2, 3, 9):
        shares = [share_of(files, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert sorted(name for share in shares for name in share) == sorted(files)
    loads = [sum(record.num_bytes for record in share_of(files, rank=rank, world_size=2).values()) for rank in range(2)]
    # The longest first, each to whoever has least: at most a third more than the best there is.
    assert max(loads) <= sum(loads) / 2 * 4 / 3


# --- names, removal, retention ---


def half(folder: Path) -> Path:
    (folder / "epi").mkdir(parents=True)
    (folder / "weights").write_text("half")
    return folder


def test_leftovers_are_put_right(tmp_path: Path) -> None:
    # Killed while files were written; between the manifest and its name; between the two renames of a replacement, the
    # new one whole or not; after them; while one was removed.
    half(tmp_path / "a.incomplete")
    make_checkpoint(tmp_path / "b.incomplete", step=2)
    make_checkpoint(tmp_path / "c.replaced", step=3)
    make_checkpoint(tmp_path / "c.incomplete", step=33)
    make_checkpoint(tmp_path / "d.replaced", step=4)
    half(tmp_path / "d.incomplete")
    make_checkpoint(tmp_path / "e", step=55)
    make_checkpoint(tmp_path / "e.replaced", step=5)
    half(tmp_path / "f.removed")
    make_checkpoint(tmp_path / "v1.2", step=1)
    assert {one.path.name for one in checkpoints_in(tmp_path)} == {"e", "v1.2"}
    done = clean_up(tmp_path)
    assert {one.path.name: one.step for one in checkpoints_in(tmp_path)} == {
        "v1.2": 1,
        "b": 2,
        "d": 4,
        "c": 33,
        "e": 55,
    }
    assert leftovers_in(tmp_path) == []
    assert len(done) == 7
    assert clean_up(tmp_path) == []


def test_replacing_a_checkpoint_leaves_one_of_the_two_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after every single change of a name."""
    for killed_after in range(8):
        folder = tmp_path / str(killed_after)
        make_checkpoint(folder / "best", step=1)
        make_checkpoint(folder / "best.incomplete", step=2)
        changes = [0]

        def counting(change: Callable[..., None], changes: list[int] = changes, last: int = killed_after) -> Callable:
            def run(*args: object, **kwargs: object) -> None:
                if changes[0] == last:
                    raise KeyboardInterrupt
                changes[0] += 1
                change(*args, **kwargs)

            return run

        with monkeypatch.context() as patch:
            for owner, name in ((Path, "rename"), (Path, "unlink"), (shutil, "rmtree")):
                patch.setattr(owner, name, counting(getattr(owner, name)))
            try:
                put_in_place(folder / "best.incomplete")
            except KeyboardInterrupt:
                assert changes[0] == killed_after
            else:
                assert killed_after > 3
        clean_up(folder)
        assert [one.path.name for one in checkpoints_in(folder)] == ["best"]
        assert manifest_of(folder / "best").step == 2, killed_after
        assert leftovers_in(folder) == []


def test_what_cannot_be_removed_is_left_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        make_checkpoint(tmp_path / f"s{step}", step=step)

    def fail(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        prune(tmp_path, Retention(1))
    assert caplog.text.count("could not be removed") == 2
    # It is no checkpoint any more, and the next call tries again.
    assert [one.path.name for one in checkpoints_in(tmp_path)] == ["s3"]
    assert len(leftovers_in(tmp_path)) == 2
    prune(tmp_path, Retention(1))
    assert leftovers_in(tmp_path) == []


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [
        (None, None, [10, 20, 30, 40, 50]),
        (None, 20, [10, 20, 30, 40, 50]),
        (1, None, [50]),
        (2, None, [40, 50]),
        (9, None, [10, 20, 30, 40, 50]),
        (1, 20, [20, 40, 50]),
    ],
)
def test_retention(tmp_path: Path, keep_last: int | None, keep_every: int | None, kept: list[int]) -> None:
    for step in (10, 20, 30, 40, 50):
        make_checkpoint(tmp_path / f"global_step{step}", step=step)
    make_checkpoint(tmp_path / "of_another_run", step=5, run_id="other")
    half(tmp_path / "half")
    prune(tmp_path, Retention(keep_last, keep_every, run_id="run"))
    assert [one.step for one in checkpoints_in(tmp_path)] == [-1, 5, *kept]
    # A damaged one does not count among those that are kept, and is not removed.
    flip_bit(tmp_path / f"global_step{kept[-1]}" / PATH)
    assert all(one.problem is None for one in surplus(checkpoints_in(tmp_path), Retention(1)))


@pytest.mark.parametrize(("limit", "best"), [*itertools.product(range(1, 6), range(1, 5)), (3, None)])
def test_what_stays_beside_the_best_is_what_transformers_keeps(tmp_path: Path, limit: int, best: int | None) -> None:
    """The best counts among those that stay, also where it is one of the newest, and goes in no case."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for step in (1, 2, 3, 4):
        make_checkpoint(ours / f"checkpoint-{step}", step=step)
        (theirs / f"checkpoint-{step}").mkdir(parents=True)
    best_there = None if best is None else str(theirs / f"checkpoint-{best}")
    rotate_checkpoints(str(theirs), save_total_limit=limit, best_model_checkpoint=best_there)
    # What was saved last, and the best.
    paths = (ours / "checkpoint-4", *(() if best is None else (ours / f"checkpoint-{best}",)))
    prune(ours, Retention(limit, paths=paths))
    assert sorted(path.name for path in ours.iterdir()) == sorted(path.name for path in theirs.iterdir())


def test_what_a_later_process_saves_is_newer_whatever_its_step(tmp_path: Path) -> None:
    """A run that went back to step 1 leaves a branch behind: neither is its newest removed, nor the branch resumed."""
    for step in (1, 2, 3):
        make_checkpoint(tmp_path / f"s{step}", step=step)
    make_checkpoint(tmp_path / "again2", step=2, incarnation=2)
    assert checkpoints_in(tmp_path)[-1].path.name == "again2"
    assert named(tmp_path, "step:2").path.name == "again2"
    prune(tmp_path, Retention(2))
    assert [one.path.name for one in checkpoints_in(tmp_path)] == ["s3", "again2"]


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "global_step1", step=1)
    for name in ("notes.removed", "draft.incomplete"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text").touch()
    assert clean_up(tmp_path) == []
    assert len(list(tmp_path.iterdir())) == 3


def test_a_deletion_that_was_cut_off_is_ended(tmp_path: Path) -> None:
    """What shows that a folder is ours goes last, whatever its name."""
    make_checkpoint(tmp_path / "best", step=1)
    (tmp_path / "best" / PATH).unlink()
    (tmp_path / "best").rename(tmp_path / "best.removed")
    for path in (tmp_path / "best.removed").iterdir():
        if path.name != FOLDER:
            path.unlink()
    assert len(clean_up(tmp_path)) == 1
    assert not list(tmp_path.iterdir())


def test_a_trainers_checkpoint_without_a_manifest_stays_until_there_is_a_whole_one(tmp_path: Path) -> None:
    half = tmp_path / "checkpoint-1.incomplete"
    half.mkdir()
    make_checkpoint(half / "global_step1", step=1)
    for _ in range(2):
        (said,) = clean_up(tmp_path)
        assert "stays until a newer checkpoint is whole" in said
    make_checkpoint(tmp_path / "checkpoint-2", step=2)
    clean_up(tmp_path)
    assert not half.exists()


def test_a_replacement_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path / "tag", step=1)
    make_checkpoint(tmp_path / "tag.incomplete", step=2)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "tag.incomplete":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        put_in_place(tmp_path / "tag.incomplete")
    (found,) = checkpoints_in(tmp_path)
    assert (found.path.name, found.step) == ("tag", 1)


def test_removing_what_is_gone_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    remove(tmp_path / "absent")
    assert "could not be removed" in caplog.text


# --- whose it is ---


def test_a_folder_is_held_by_the_last_one_that_took_it(tmp_path: Path) -> None:
    first = take_over(tmp_path / "run")
    assert why_not_ours(tmp_path / "run", first) is None
    second = take_over(tmp_path / "run")
    assert (second.run_id, second.incarnation) == (first.run_id, 2)
    assert why_not_ours(tmp_path / "run", second) is None
    said = f"process {os.getpid()} on .* has taken .*run over, so this process"
    assert re.match(said, why_not_ours(tmp_path / "run", first) or "")
    (tmp_path / "run" / FILE).unlink()
    assert f"{FILE} is gone" in (why_not_ours(tmp_path / "run", second) or "")


def test_only_checkpoints_of_the_folder_s_own_run_are_trusted(tmp_path: Path) -> None:
    run = take_over(tmp_path / "run")
    trainers = tmp_path / "run" / "checkpoint-4" / "global_step4"
    make_checkpoint(trainers.parent, step=4, run_id=run.run_id, files={"global_step4/weights": "x"})
    # A loop of one's own may save below such a name, too.
    loop = take_over(tmp_path / "loop" / "checkpoint-4")
    assert is_own(tmp_path / "loop" / "checkpoint-4" / "global_step4", loop.run_id)
    for folder in (tmp_path / "run" / "global_step4", trainers):
        assert is_own(folder, run.run_id)
        assert not is_own(folder, "another")
        assert not is_own(folder, None)
    # A stranger's trainer's checkpoint that brings a record along, which vouches for the tag in it.
    strangers = tmp_path / "copied" / "checkpoint-4"
    brought = take_over(strangers)
    make_checkpoint(strangers, step=4, run_id=brought.run_id, files={"global_step4/weights": "x"})
    assert not is_own(strangers / "global_step4", brought.run_id)
    assert not is_own(strangers, brought.run_id)
    elsewhere = tmp_path / "elsewhere" / "global_step4"
    assert not is_own(elsewhere, run.run_id)
    with pytest.raises(UserError, match=r"pickles, so reading a stranger's checkpoint runs the stranger's code; ask"):
        check_trusted(elsewhere, run.run_id, trust=False, remedy="ask")
    check_trusted(elsewhere, run.run_id, trust=True, remedy="ask")
    (tmp_path / "run" / FILE).write_text("{}")
    with pytest.raises(RuntimeError, match=f"{FILE} is damaged"):
        read_run(tmp_path / "run")


# --- trainers' folders ---


def test_a_trainer_s_checkpoint_is_whole_with_what_the_trainer_wrote(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-5"
    make_checkpoint(folder / "global_step5", step=5)
    (folder / "trainer_state.json").write_text("{}")
    (folder / "rng_state_0.pth").write_text("random")
    committed = commit_trainer_folder(folder)
    assert committed == manifest_of(folder)
    assert set(manifest_of(folder).files) == {
        "global_step5/weights",
        "global_step5/epi/manifest.json",
        "trainer_state.json",
        "rng_state_0.pth",
    }
    assert problems_of_files(folder, manifest_of(folder).files) == []
    (tmp_path / "checkpoint-6").mkdir()
    with pytest.raises(RuntimeError, match="checkpoint-6 has no tag in it"):
        commit_trainer_folder(tmp_path / "checkpoint-6")


def test_half_checkpoints_of_a_trainer_are_set_aside(tmp_path: Path) -> None:
    take_over(tmp_path)
    whole = tmp_path / "checkpoint-1"
    make_checkpoint(whole / "global_step1", step=1)
    commit_trainer_folder(whole)
    # Saved by a trainer without us.
    plain = tmp_path / "checkpoint-2"
    (plain / "global_step2").mkdir(parents=True)
    (plain / "trainer_state.json").touch()
    # Killed before the tag, within it, after it.
    (tmp_path / "checkpoint-3").mkdir()
    half(tmp_path / "checkpoint-4" / "global_step4.incomplete")
    make_checkpoint(tmp_path / "checkpoint-5" / "global_step5", step=5)
    (tmp_path / "checkpoint-best").mkdir()
    renamed = [path.name for path in set_aside_incomplete(tmp_path)]
    assert renamed == [f"checkpoint-{step}.incomplete" for step in (3, 4, 5)]
    assert {path.name for path in tmp_path.iterdir() if path.is_dir() and path.suffix == ""} == {
        "checkpoint-1",
        "checkpoint-2",
        "checkpoint-best",
    }
    clean_up(tmp_path)
    assert leftovers_in(tmp_path) == []


# --- random generators ---


def test_random_states_survive_json(tmp_path: Path) -> None:
    import random

    import numpy as np

    def draw() -> tuple[float, float, float]:
        return random.gauss(0, 1), float(np.random.normal()), float(torch.rand(1))

    # Both keep one number of a pair for the next call.
    draw()
    saved = random_states()
    expected = [draw() for _ in range(3)]
    others = json.loads(json.dumps(saved.others))
    draw()
    restore_random_states(saved.tensors, others)
    assert [draw() for _ in range(3)] == expected


def test_the_newest_of_a_folder_is_asked_for_by_ranks_only(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no process group yet; call it after the trainer is constructed"):
        newest_checkpoint(tmp_path)
