"""What a load takes and what it refuses, on every rank alike; what a save leaves that cannot be finished."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist

from epi_ds.checkpoint import digest, loading, saving, store
from epi_ds.checkpoint.catalog import checkpoints_in, leftovers_in
from epi_ds.checkpoint.durable import write_json
from epi_ds.checkpoint.manifest import PATH, sealed
from epi_ds.checkpoint.run import take_over
from epi_ds.checkpoint.tag import Consent, open_tag
from epi_ds.errors import CheckpointError, UserError
from epi_ds.inspect.convert import convert
from tests.support.engines import (
    assert_same,
    collected_logs,
    ds_config,
    engine_of,
    full_masks,
    full_weights,
    train_step,
)
from tests.support.models import OddNet, TiedLM, odd_batch
from tests.support.processes_of_engines import another_process
from tests.support.ranks import run_ranks
from tests.support.tags import change_manifest, flip_bit, manifest_of
from tests.support.tiers import slow_but

pytestmark = pytest.mark.zero3

SECTION: dict[str, Any] = {"ratio": 0.2, "refresh_interval": 4, "ema_decay": 0.9}
STEPS = 6


def save_run(folder: str, section: dict[str, Any], steps: int) -> None:
    with engine_of(OddNet, ds_config(epi=section)) as engine:
        for step in range(steps):
            train_step(engine, step, odd_batch)
            assert engine.save_checkpoint(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of two ranks after each of 6 steps; the mask of step 4 is in force in the last three."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(save_run, 2, str(folder), SECTION, STEPS)
    return folder


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


Loaded = tuple[int, str, list[str]]


def load(folder: str, section: dict[str, Any], tag: str | None = None, **arguments: Any) -> Loaded:
    """Return the step that a load arrives at, what it says where it fails, and what it logs."""
    with collected_logs() as messages, engine_of(OddNet, ds_config(epi=section)) as engine:
        before = full_weights(engine)
        try:
            path, _ = engine.load_checkpoint(folder, tag, **arguments)
        except (CheckpointError, UserError) as error:
            # Nothing was touched.
            assert_same(before, full_weights(engine))
            return -1, str(error), list(messages)
        assert (path is None) == (engine.global_steps == 0)
        return engine.global_steps, "", list(messages)


def loaded(folder: Path, section: dict[str, Any] = SECTION, tag: str | None = None, world_size: int = 2) -> Loaded:
    """`load` on ranks, of which all say the same."""
    results = run_ranks(load, world_size, str(folder), section, tag)
    assert all(result[:2] == results[0][:2] for result in results)
    step, error, messages = results[0]
    return step, error, messages


# --- which one ---


def test_the_newest_is_loaded_or_the_one_that_is_asked_for(saved: Path) -> None:
    assert loaded(saved)[0] == 6
    assert loaded(saved, tag="auto")[0] == 6
    assert loaded(saved, tag="step:3")[0] == 3
    assert loaded(saved, tag="global_step2")[0] == 2
    assert "holds no checkpoint 'global_step9'; there are: global_step1, " in loaded(saved, tag="global_step9")[1]
    assert "no complete checkpoint of step 9; there are steps 1, 2, 3, 4, 5, 6" in loaded(saved, tag="step:9")[1]


def test_an_empty_folder_is_a_new_run(tmp_path: Path) -> None:
    step, error, messages = loaded(tmp_path)
    assert (step, error) == (0, "")
    assert any("holds no checkpoint: nothing is loaded" in text for text in messages)


@pytest.mark.parametrize("damage", ["optimizer", "model", "shard", "manifest", "missing", "truncated"])
def test_what_is_damaged_is_passed_over_and_named(run: Path, damage: str) -> None:
    tag = run / "global_step6"
    if damage == "missing":
        (tag / "epi" / "rank_00001.safetensors").unlink()
        named = "rank_00001.safetensors is missing"
    elif damage == "truncated":
        path = tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
        path.write_bytes(path.read_bytes()[:-7])
        named = "optim_states.pt has"
    else:
        names = {
            "optimizer": "zero_pp_rank_1_mp_rank_00_optim_states.pt",
            "model": "zero_pp_rank_1_mp_rank_00_model_states.pt",
            "shard": "epi/rank_00000.safetensors",
            "manifest": "epi/manifest.json",
        }
        path = tag / names[damage]
        flip_bit(path, at=path.stat().st_size // 2)
        named = f"{path} is damaged"
    step, error, messages = loaded(run)
    assert (step, error) == (5, "")
    (said,) = [text for text in messages if "passing over" in text]
    assert named in said
    # Asked for by name, it is not replaced by another one.
    step, error, _ = loaded(run, tag="global_step6")
    assert step == -1
    assert named in error
    assert "Load another tag" in error


def convert_newest(folder: str) -> None:
    """Write the newest tag in the universal format, as ``epi-ds checkpoints convert`` does."""
    if dist.get_rank() == 0:
        newest = checkpoints_in(Path(folder))[-1]
        tag = open_tag(newest, consent=Consent(False, ""))
        convert(tag, Path(folder) / "universal" / newest.path.name)
    dist.barrier()


def load_universal(folder: str, section: dict[str, Any], is_asked_for: bool, tag: str | None) -> tuple[int, str]:
    """Return the step that a load arrives at, and what it says where it fails."""
    config = ds_config(epi=section, **({"checkpoint": {"load_universal": True}} if is_asked_for else {}))
    with engine_of(OddNet, config) as engine:
        try:
            engine.load_checkpoint(folder, tag)
        except (CheckpointError, UserError) as error:
            return -1, str(error)
        assert engine.epi.stats().isolated == 0
        return engine.global_steps, ""


@pytest.mark.slow
def test_the_universal_format_is_named_with_what_loads_it(run: Path) -> None:
    run_ranks(convert_newest, 2, str(run))
    universal, name = str(run / "universal"), "global_step6"
    fresh = {**SECTION, "missing_state": "fresh", "checkpoint": {"trust": True}}

    def said(folder: str, section: dict[str, Any], is_asked_for: bool, tag: str | None) -> tuple[int, str]:
        own, other = run_ranks(load_universal, 2, folder, section, is_asked_for, tag)
        assert own == other
        return own

    for section, tag in ((SECTION, None), (SECTION, name), (fresh, None), (fresh, name)):
        step, error = said(universal, section, False, tag)
        assert step == -1
        assert "is in DeepSpeed's universal format, which holds no importance and no masks" in error
    # Both remedies that it names.
    assert said(universal, fresh, True, name) == (6, "")
    assert loaded(run)[0] == 6
    # The other way round DeepSpeed ends in an assertion.
    step, error = said(str(run), SECTION, True, None)
    assert "is not in DeepSpeed's universal format" in error


def test_where_all_are_damaged_a_run_does_not_begin_again(run: Path) -> None:
    for found in checkpoints_in(run):
        flip_bit(found.path / "epi" / "manifest.json", at=20)
    step, error, _ = loaded(run)
    assert step == -1
    assert "can be resumed from" in error
    assert error.count("is damaged") == 6
    for found in checkpoints_in(run):
        shutil.rmtree(found.path)
    assert "latest says that a checkpoint was saved there, and there is none" in loaded(run)[1]


@pytest.mark.parametrize("content", ["", "\x00\x00garbage", "global_step1", None])
def test_a_torn_latest_changes_nothing(run: Path, content: str | None) -> None:
    (run / "latest").unlink()
    if content is not None:
        (run / "latest").write_text(content)
    assert loaded(run)[0] == 6


# --- agreement ---


def load_seeing(folder: str, hidden: str) -> str:
    """What a load says where the last rank does not see what the others see."""
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == dist.get_world_size() - 1:
            if hidden == "manifest":
                patch.setattr(loading, "read_manifest", lambda folder: None)
            else:
                patch.setattr(digest, "record_of", lambda path: {}["file"])
        return load(folder, SECTION, "global_step6")[1]


def test_ranks_that_see_different_files_refuse_together(saved: Path) -> None:
    for hidden, said in (
        ("manifest", "the ranks do not see the same checkpoint"),
        ("file", "KeyError: 'file'"),
    ):
        errors = run_ranks(load_seeing, 2, str(saved), hidden)
        assert errors[0] == errors[1]
        assert said in errors[0], hidden


# --- whose it is ---


class Sideeffect:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def test_a_stranger_s_checkpoint_is_not_unpickled(run: Path, tmp_path: Path) -> None:
    """Also where its manifest is sound: whoever forges a pickle can write the checksum beside it."""
    trap = tmp_path / "ran"
    tag = run / "global_step6"
    for path in tag.glob("*.pt"):
        torch.save(Sideeffect(trap), path)
    records = {name: digest.record_of(tag / name).model_dump() for name in manifest_of(tag).files}
    change_manifest(tag, lambda content: content.update(files=records, run_id="a stranger's"))
    step, error, _ = loaded(run)
    assert step == -1
    assert "belongs to run a strang" in error
    assert "set checkpoint.trust: true" in error
    assert not trap.exists()
    # Moved out of its run, an own one is as good as a stranger's.
    shutil.copytree(run / "global_step5", tmp_path / "elsewhere" / "global_step5")
    assert "no epi_run.json in the folder it lies in" in loaded(tmp_path / "elsewhere")[1]
    assert loaded(tmp_path / "elsewhere", SECTION | {"checkpoint": {"trust": True}})[0] == 5


def save_plain(folder: str) -> None:
    with engine_of(OddNet, ds_config()) as engine:
        train_step(engine, 0, odd_batch)
        engine.save_checkpoint(folder)


def refused_weights(folder: str, section: dict[str, Any], options: dict[str, bool]) -> str:
    with engine_of(OddNet, ds_config(epi=section)) as engine, pytest.raises(UserError) as refused:
        engine.load_checkpoint(folder, **options)
    return str(refused.value)


def test_a_checkpoint_without_isolation_state_needs_consent(tmp_path: Path) -> None:
    run_ranks(save_plain, 2, str(tmp_path))
    assert "epi/manifest.json is missing" in loaded(tmp_path)[1]
    fresh = SECTION | {"missing_state": "fresh"}
    assert "has no manifest of ours" in loaded(tmp_path, fresh)[1]
    trusting = fresh | {"checkpoint": {"trust": True}}
    step, _, messages = loaded(tmp_path, trusting)
    assert step == 1
    assert any("importance starts from zero" in text for text in messages)
    assert loaded(tmp_path, trusting, tag="global_step1")[0] == 1
    for options in ({"load_module_only": True}, {"load_optimizer_states": False}):
        for said in run_ranks(refused_weights, 2, str(tmp_path), trusting, options):
            assert "DeepSpeed by itself loads no weights under ZeRO-3 with load_module_only" in said
    # What was ours and lost its manifest is not taken for a plain one beside others that are whole.
    run_ranks(save_run, 2, str(tmp_path / "ours"), SECTION, 2)
    (tmp_path / "ours" / "global_step2" / "epi" / "manifest.json").unlink()
    assert loaded(tmp_path / "ours", trusting)[0] == 1


def test_other_settings_are_refused_by_name_all_at_once(saved: Path) -> None:
    changed = SECTION | {"layer": "tensor", "ema_decay": 0.5, "seed": 3}
    _, error, _ = loaded(saved, changed)
    for said in ("epi.layer was 'block', is 'tensor'", "epi.ema_decay was 0.9, is 0.5", "epi.seed was 0, is 3"):
        assert said in error
    # The schedule, the ratio and how checkpoints are kept may change between two runs.
    allowed = {"ratio": 0.1, "refresh_interval": 9, "checkpoint": {"keep_last": 2}, "max_skipped_steps": 7}
    assert loaded(saved, SECTION | allowed)[0] == 6


def load_another_model(folder: str) -> str:
    with engine_of(TiedLM, ds_config(epi=SECTION)) as engine:
        with pytest.raises(UserError) as refused:
            engine.load_checkpoint(folder)
        with pytest.raises(UserError, match="is of another model"):
            engine.load_checkpoint(folder, load_module_only=True)
        return str(refused.value)


def test_another_model_is_refused_by_the_first_parameter_that_differs(saved: Path) -> None:
    errors = run_ranks(load_another_model, 2, str(saved))
    assert errors[0] == errors[1]
    assert "the trainable parameter blocks.0.bias had shape (13,)" in errors[0]


def test_another_format_is_refused(run: Path) -> None:
    for found in checkpoints_in(run):
        change_manifest(found.path, lambda content: content.update(format_version=3))
    assert "has format version 3, and this release reads 4; resume with the epi_ds release that" in loaded(run)[1]


# --- weights alone ---


def test_a_tag_without_the_keys_of_later_releases_is_loaded(run: Path) -> None:
    """Which keys those are, and that no other may be missing: tests/unit/test_releases.py."""
    path = run / "global_step6" / PATH
    content = {name: value for name, value in json.loads(path.read_text()).items() if name != "digest"}
    for name in ("incarnation", "saved_at", "versions"):
        del content[name]
    for name in ("threshold_codes", "last_row_codes", "extra"):
        del content["isolation"][name]
    for name in ("finished_stages", "held_gradient_energy", "held_steps", "held_step_energy", "measured_steps"):
        del content["isolation"]["counters"][name]
    write_json(path, sealed(content))
    assert loaded(run, tag="global_step6") == (6, "", [])


def check_weights_alone(folder: str, arguments: dict[str, Any]) -> tuple[int, dict[str, int]]:
    with engine_of(OddNet, ds_config(epi=SECTION | {"checkpoint": {"allow_new_batch_size": True}})) as engine:
        engine.load_checkpoint(folder, "global_step4")
        expected = full_weights(engine)
    with engine_of(OddNet, ds_config(epi=SECTION)) as engine:
        engine.load_checkpoint(folder, "global_step4", **arguments)
        assert_same(full_weights(engine), expected)
        # The model computes with them too.
        for name, parameter in engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                assert torch.equal(parameter, expected[name])
        assert not any(mask.any() for mask in full_masks(engine).values())
        train_step(engine, 4, odd_batch)
        return engine.global_steps, engine.epi.stats().counters.to_dict()  # type: ignore[return-value]


@pytest.mark.parametrize("world_size", slow_but([2, 3], 3))
@pytest.mark.parametrize(
    ("arguments", "steps"),
    [({"load_module_only": True}, 1), ({"load_optimizer_states": False, "load_lr_scheduler_states": False}, 5)],
)
def test_weights_are_those_of_the_tag_and_isolation_begins_anew(
    saved: Path, world_size: int, arguments: dict[str, Any], steps: int
) -> None:
    """DeepSpeed loads none with the first, and those of `latest` with the second."""
    for found, counters in run_ranks(check_weights_alone, world_size, str(saved), arguments):
        assert found == steps
        assert counters["applied_steps"] == 1


# --- saves that cannot be finished ---


def save_failing(folder: str, section: dict[str, Any], fail: str) -> list[Any]:
    """Save, fail to save once, train on and save again; return what the failing one gave and what was logged."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    with collected_logs() as messages, engine_of(OddNet, ds_config(epi=section)) as engine:
        train_step(engine, 0, odd_batch)
        assert engine.save_checkpoint(folder, tag="best")
        train_step(engine, 1, odd_batch)
        with pytest.MonkeyPatch.context() as patch:
            if fail == "space":
                patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
            # One rank of two; the other must not wait for it. Of the manifest it is rank 0's business.
            elif dist.get_rank() == (0 if fail == "manifest" else 1):
                targets: dict[str, tuple[Any, str]] = {
                    "torch.save": (torch, "save"),
                    "shard": (store, "write_shard"),
                    "sync": (saving, "sync_file"),
                    "manifest": (saving, "write_manifest"),
                }
                patch.setattr(*targets[fail], refuse)
            try:
                outcome: Any = engine.save_checkpoint(folder, tag="best")
            except CheckpointError as error:
                outcome = str(error)
        train_step(engine, 2, odd_batch)
        saved = engine.save_checkpoint(folder, tag="later")
        return [outcome, saved, list(messages)]


@pytest.mark.parametrize("fail", ["torch.save", "shard", "sync", "manifest", "space"])
def test_a_save_that_fails_leaves_the_one_before_and_training_goes_on(tmp_path: Path, fail: str) -> None:
    results = run_ranks(save_failing, 2, str(tmp_path), SECTION, fail)
    assert [result[:2] for result in results] == [[False, True]] * 2
    (said,) = [text for text in results[0][2] if "was not saved, and training goes on" in text]
    assert ("No space left on device" if fail != "space" else "0.00 GB free; make room") in said
    assert {found.path.name: found.step for found in checkpoints_in(tmp_path)} == {"best": 1, "later": 3}
    assert leftovers_in(tmp_path) == []
    assert loaded(tmp_path, tag="best")[0] == 1


def test_a_save_that_fails_stops_the_run_where_that_is_wanted(tmp_path: Path) -> None:
    section = SECTION | {"checkpoint": {"on_failure": "stop"}}
    results = run_ranks(save_failing, 2, str(tmp_path), section, "torch.save")
    assert results[0][0] == results[1][0]
    assert "rank 1: " in results[0][0]
    assert "zero_pp_rank_1" in results[0][0]


def two_jobs(folder: str) -> tuple[bool, str]:
    """A second job begins to save where the first one does: the first one saves no more."""
    with engine_of(OddNet, ds_config(epi=SECTION)) as first, engine_of(OddNet, ds_config(epi=SECTION)) as second:
        train_step(first, 0, odd_batch)
        train_step(second, 0, odd_batch)
        assert first.save_checkpoint(folder)
        with another_process():
            assert second.save_checkpoint(folder)
        train_step(first, 1, odd_batch)
        with pytest.raises(CheckpointError) as refused:
            first.save_checkpoint(folder)
        train_step(second, 1, odd_batch)
        with another_process():
            return second.save_checkpoint(folder), str(refused.value)


def test_of_two_jobs_in_one_folder_the_later_one_saves(tmp_path: Path) -> None:
    results = run_ranks(two_jobs, 2, str(tmp_path))
    assert results[0] == results[1]
    saved, refusal = results[0]
    assert saved
    assert "so this process" in refusal
    assert "Stop one of the two jobs, or give each a folder of its own" in refusal
    assert [found.step for found in checkpoints_in(tmp_path)] == [1, 2]
    assert json.loads((tmp_path / "epi_run.json").read_text())["incarnation"] == 2


def two_engines(folder: str) -> tuple[str, str]:
    """An actor and a critic of one process save in one folder; each is resumed after the other, in another process."""
    config = ds_config(epi=SECTION | {"checkpoint": {"keep_last": 1}})
    with engine_of(OddNet, config) as actor, engine_of(OddNet, config) as critic:
        for step in range(2):
            for name, engine in (("actor", actor), ("critic", critic)):
                train_step(engine, step, odd_batch)
                assert engine.save_checkpoint(folder, tag=f"{name}{step}")
        with pytest.raises(UserError) as replaced:
            actor.save_checkpoint(folder, tag="critic1")
        # Its own newest, though the critic's is newer.
        assert "/actor1/" in actor.load_checkpoint(folder)[0]
    assert sorted(found.path.name for found in checkpoints_in(Path(folder))) == ["actor1", "critic1"]
    with another_process(), engine_of(OddNet, config) as critic, engine_of(OddNet, config) as actor:
        with pytest.raises(UserError) as unknown:
            critic.load_checkpoint(folder)
        for name, engine in (("critic", critic), ("actor", actor)):
            engine.load_checkpoint(folder, tag=f"{name}1")
            train_step(engine, 2, odd_batch)
            assert engine.save_checkpoint(folder, tag=f"{name}2")
    return str(replaced.value), str(unknown.value)


def test_engines_of_one_process_share_a_folder_and_keep_their_own(tmp_path: Path) -> None:
    results = run_ranks(two_engines, 2, str(tmp_path))
    assert results[0] == results[1]
    replaced, unknown = results[0]
    assert "critic1 is a tag of engine 1 of those that save there, and this is engine 0" in replaced
    assert "holds checkpoints of 2 engines" in unknown
    assert "actor1, critic1" in unknown
    assert {found.path.name: manifest_of(found.path).engine for found in checkpoints_in(tmp_path)} == {
        "actor2": 0,
        "critic2": 1,
    }


def test_older_checkpoints_go_when_newer_ones_are_whole(tmp_path: Path) -> None:
    section = SECTION | {"checkpoint": {"keep_last": 2, "keep_every": 3}}
    run_ranks(save_run, 2, str(tmp_path), section, 8)
    assert [found.step for found in checkpoints_in(tmp_path)] == [3, 6, 7, 8]
    assert (tmp_path / "latest").read_text() == "global_step8"


def unwritable(folder: str, on_failure: str) -> str:
    section = SECTION | {"checkpoint": {"on_failure": on_failure}}
    with collected_logs() as messages, engine_of(OddNet, ds_config(epi=section)) as engine:
        train_step(engine, 0, odd_batch)
        try:
            assert not engine.save_checkpoint(folder)
        except CheckpointError as error:
            return str(error)
        return "\n".join(messages)


def test_a_folder_that_cannot_be_made_fails_the_save_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    continued, _ = run_ranks(unwritable, 2, str(tmp_path / "file" / "run"), "continue")
    assert "was not saved, and training goes on" in continued
    for said in (continued, *run_ranks(unwritable, 2, str(tmp_path / "file" / "run"), "stop")):
        assert "Not a directory" in said or "File exists" in said


def saved_under_odd_names(folder: str) -> list[str]:
    said = []
    with engine_of(OddNet, ds_config(epi=SECTION)) as engine:
        train_step(engine, 0, odd_batch)
        for save_dir, tag in ((folder, "a/b"), (folder, ".."), ("", "tag")):
            with pytest.raises(UserError) as refused:
                engine.save_checkpoint(save_dir, tag=tag)
            said.append(str(refused.value))
        # One folder by two names is one folder.
        for save_dir in (folder, os.path.relpath(folder)):
            assert engine.save_checkpoint(save_dir, tag="tag")
    return said


def test_a_tag_is_one_name_in_a_folder(tmp_path: Path) -> None:
    for said in run_ranks(saved_under_odd_names, 2, str(tmp_path))[0]:
        assert "give a folder, and a tag that is one name in it" in said
    assert json.loads((tmp_path / "epi_run.json").read_text())["incarnation"] == 1


def save_and_load(folder: str) -> list[str]:
    """Return what the load of what was just saved says."""
    with engine_of(OddNet, ds_config(epi=SECTION)) as engine:
        train_step(engine, 0, odd_batch)
        assert engine.save_checkpoint(folder, tag="best[*]?")
        weights = full_weights(engine)
    with collected_logs() as messages, engine_of(OddNet, ds_config(epi=SECTION)) as engine:
        engine.load_checkpoint(folder)
        assert_same(full_weights(engine), weights)
        return list(messages)


def test_folders_and_tags_may_have_the_signs_of_patterns_in_their_names(tmp_path: Path) -> None:
    said = run_ranks(save_and_load, 2, str(tmp_path / "run[lr=1e-5]"))[0]
    assert [text for text in said if "replaces hyper-parameters" in text] == []


def take_over_during_a_save(folder: str) -> str:
    """Another job begins to save after this one's files were written, and before they get their name."""
    with engine_of(OddNet, ds_config(epi=SECTION)) as engine:
        train_step(engine, 0, odd_batch)
        write = type(engine)._epi_write

        def slow(self: Any, *arguments: Any) -> None:
            write(self, *arguments)
            if dist.get_rank() == 0:
                take_over(Path(folder))
            dist.barrier()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(engine), "_epi_write", slow)
            with pytest.raises(CheckpointError) as refused:
                engine.save_checkpoint(folder)
        return str(refused.value)


def test_a_job_that_lost_its_folder_during_a_save_completes_nothing(tmp_path: Path) -> None:
    for said in run_ranks(take_over_during_a_save, 2, str(tmp_path)):
        assert "Stop one of the two jobs" in said
    assert checkpoints_in(tmp_path) == []


def go_back(folder: str) -> None:
    with engine_of(OddNet, ds_config(epi=SECTION | {"checkpoint": {"keep_last": 3}})) as engine:
        for step in range(4):
            train_step(engine, step, odd_batch)
            engine.save_checkpoint(folder)
        engine.load_checkpoint(folder, tag="step:2")
        train_step(engine, 7, odd_batch)
        engine.save_checkpoint(folder, tag="again")


def test_a_run_that_went_back_continues_on_its_new_branch(tmp_path: Path) -> None:
    run_ranks(go_back, 2, str(tmp_path))
    assert [found.path.name for found in checkpoints_in(tmp_path)] == ["global_step3", "global_step4", "again"]
    assert loaded(tmp_path)[0] == 3
