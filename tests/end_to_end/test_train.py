"""``epi-ds train``: stages, rows, resuming and evaluation, over real launchers."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoTokenizer

from epi_ds.demo.base_model import pretrain_small_model
from epi_ds.evaluation.tasks import load_conversations
from epi_ds.launch.local import free_port, remove_buffers
from epi_ds.recipe.loading import load_recipe
from epi_ds.train.run_folder import RunFolder
from epi_ds.train.stages import StageRows, plan_stages, row_order
from tests.end_to_end.recipes import (
    ACCUMULATION,
    MICRO_BATCH,
    RANKS,
    TOTAL_STEPS,
    assert_same_files,
    lines_of,
    write_recipe,
)
from tests.support.forks import epi_ds, run_module
from tests.support.processes import checked, run_command, run_epi_ds
from tests.support.tags import manifest_of

pytestmark = pytest.mark.end_to_end

RECORDER = "tests.end_to_end.recorder"
# In the middle of the second stage, two steps after the newest checkpoint.
DIES_AT = 8
NEWEST_CHECKPOINT = 6


def assert_same_content(one: Any, other: Any) -> None:
    """Compare what was unpickled; tensors to the bit."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))
    elif isinstance(one, dict):
        assert list(one) == list(other)
        assert_same_content(list(one.values()), list(other.values()))
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for own, theirs in zip(one, other, strict=True):
            assert_same_content(own, theirs)
    elif one != other:
        # Objects that are compared by identity.
        assert_same_content(vars(one), vars(other))


def digests(folder: Path) -> dict[str, str]:
    """Return a digest of every file below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that chooses among four answers, so that it solves some of the recipe's questions and not all."""
    folder = tmp_path_factory.mktemp("base") / "model"
    pretrain_small_model(folder, skills=("logic",), steps=60, batch_size=8)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recorded run of all steps, evaluated with partitioned weights."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    recipe = write_recipe(folder, base, evaluation={"weights": "partitioned"})
    checked(run_module(RECORDER, str(recipe), str(folder), num_ranks=RANKS))
    return folder


@pytest.fixture(scope="module")
def resumed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, evaluated with gathered weights, killed in its second stage and continued by ``epi-ds train``."""
    folder = tmp_path_factory.mktemp("resumed")
    recipe = write_recipe(folder, base)
    killed = run_module(RECORDER, str(recipe), str(folder), str(DIES_AT), num_ranks=RANKS)
    assert killed.exit_code != 0
    assert RunFolder(folder / "run").complete_checkpoints()[-1].step == NEWEST_CHECKPOINT, killed.output[-4000:]
    output = checked(epi_ds("train", str(recipe), num_ranks=RANKS))
    assert f"resuming {folder / 'run' / 'checkpoints'}/checkpoint-{NEWEST_CHECKPOINT}" in output
    return folder


@pytest.fixture(scope="module")
def recorded(uninterrupted: Path) -> list[list[dict[str, Any]]]:
    """What each rank of the uninterrupted run trained on, per micro-batch."""
    return [
        [json.loads(line) for line in (uninterrupted / f"rank_{rank}.jsonl").read_text().splitlines()]
        for rank in range(RANKS)
    ]


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(uninterrupted: Path, resumed: Path) -> None:
    left, right = uninterrupted / "run", resumed / "run"
    steps = lines_of(left, "step")
    assert [line["step"] for line in steps] == list(range(1, TOTAL_STEPS + 1))
    assert steps == lines_of(right, "step")
    # Thresholds, layers' shares and Jaccard of every mask; the masks themselves lie in the checkpoints.
    assert lines_of(left, "refresh") == lines_of(right, "refresh")
    # Every file of the last checkpoint: weights, moments, importance, masks, random states; and what it says of itself.
    manifests = [manifest_of(run / f"checkpoints/checkpoint-{TOTAL_STEPS}") for run in (left, right)]
    one, other = (manifest.model_dump(exclude={"run_id", "incarnation", "saved_at"}) for manifest in manifests)
    assert_same_files(*manifests)
    assert {**one, "files": {}} == {**other, "files": {}}
    exported, other = digests(left / "export"), digests(right / "export")
    # By the command, which the recorder is not.
    assert other.pop("README.md")
    assert exported == other


@pytest.mark.slow
def test_ranks_train_on_different_rows_in_the_documented_order(
    uninterrupted: Path, base: Path, recorded: list[list[dict[str, Any]]]
) -> None:
    """Micro-batch after micro-batch, rank 0 takes the next rows of the run's order and rank 1 those after them."""
    recipe = load_recipe(str(uninterrupted / "recipe.yaml"), [])
    tokenizer = AutoTokenizer.from_pretrained(base)
    conversations = [load_conversations(stage.data, seed=3) for stage in recipe.stages]
    counts = [
        StageRows(stage.name, len(c), stage.epochs) for stage, c in zip(recipe.stages, conversations, strict=True)
    ]
    global_batch = RANKS * MICRO_BATCH * ACCUMULATION
    order = row_order(counts, plan_stages(counts, global_batch=global_batch), global_batch=global_batch, seed=3)
    flat = list(itertools.chain.from_iterable(conversations))
    turns = [[dict(message) for message in flat[row].messages] for row in order]
    expected = [tokenizer.apply_chat_template(one, return_dict=True)["input_ids"] for one in turns]
    seen = [
        row
        for micro_batches in zip(*recorded, strict=True)
        for micro_batch in micro_batches
        for row in micro_batch["rows"]
    ]
    assert seen == expected
    assert len(seen) == TOTAL_STEPS * global_batch


@pytest.mark.slow
def test_moments_are_reset_or_carried_as_each_stage_says(recorded: list[list[dict[str, Any]]]) -> None:
    momentum = {line["step"]: line["momentum"] for line in reversed(recorded[0])}
    # The first stage starts without any, the second carries, the third resets.
    assert [step for step in range(TOTAL_STEPS) if momentum[step] == 0.0] == [0, 10]


@pytest.mark.slow
def test_every_stage_has_the_learning_rate_it_asks_for(uninterrupted: Path) -> None:
    rates = [line["learning_rate"] for line in lines_of(uninterrupted / "run", "step")]
    # Linear with 2 steps of warm-up over 5, constant at its own peak, and half a cosine over 4.
    first = [0, 1 / 2, 1, 2 / 3, 1 / 3]
    third = [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    expected = [3e-4 * x for x in first] + [1e-3] * 5 + [3e-4 * x for x in third]
    # The logged rate is the one after the step's scheduler, so the first of the list is never logged.
    assert rates[:-1] == pytest.approx(expected[1:])


@pytest.mark.slow
def test_metrics_say_which_stage_runs(uninterrupted: Path) -> None:
    stages = [line["stage"] for line in lines_of(uninterrupted / "run", "step")]
    assert stages == ["reset"] * 5 + ["carry"] * 5 + ["chat"] * 4
    # S, mask and the count of applied steps go on over the stages' ends, where the stage that ends becomes a task.
    refreshes = lines_of(uninterrupted / "run", "refresh")
    assert [line["step"] for line in refreshes] == [3, 5, 6, 9, 10, 12]
    tasks = [[task["name"] for task in line["tasks"]] for line in refreshes]
    two, three = ["reset", None], ["reset", "carry", None]
    assert tasks == [[], two, two, two, three, three]
    for line in refreshes[1:]:
        assert all(0 < task["isolated"] <= line["isolated"] for task in line["tasks"])


@pytest.mark.slow
def test_gathered_and_partitioned_evaluation_agree(uninterrupted: Path, resumed: Path) -> None:
    partitioned, gathered = lines_of(uninterrupted / "run", "evaluation"), lines_of(resumed / "run", "evaluation")
    assert [line["step"] for line in partitioned] == [0, 5, 10, 14]
    assert partitioned == gathered
    # The comparison would be empty with a model that solves nothing or everything.
    assert any(0 < score["value"] < 1 for score in partitioned[0]["scores"].values())
    assert partitioned[0]["scores"]["carry"]["value"] > partitioned[2]["scores"]["carry"]["value"] > 0


@pytest.mark.slow
def test_one_rank_scores_and_probes_for_a_static_mask(uninterrupted: Path, base: Path, tmp_path: Path) -> None:
    """One rank under DeepSpeed's own command, another policy: the same scores, and one mask from first to last step."""
    epi = {"policy": "static", "ratio": 0.1, "probe_steps": 2}
    recipe = write_recipe(tmp_path, base, method={"epi": epi})
    shorter = ["stages.reset.data.rows=6", "stages.carry.data.rows=4", "stages.chat.data.rows=4"]
    port = free_port()
    deepspeed = [str(Path(sys.prefix) / "bin" / "deepspeed"), "--num_gpus=1", f"--master_port={port}"]
    checked(run_command([*deepspeed, "--module", "epi_ds.cli.main", "train", str(recipe), *shorter]))
    remove_buffers(port)
    (before, *_) = lines_of(tmp_path / "run", "evaluation")
    assert before == lines_of(uninterrupted / "run", "evaluation")[0]
    (refresh,) = lines_of(tmp_path / "run", "refresh")
    assert refresh["step"] == 0
    assert {line["isolated"] for line in lines_of(tmp_path / "run", "step")} == {refresh["isolated"]}
    # Other rows to probe, another mask.
    given = [f"output={tmp_path / 'given'}", "method.probe={skill: code, rows: 4}", "ranks=1"]
    checked(epi_ds("train", str(recipe), *shorter, *given, num_ranks=1))
    assert lines_of(tmp_path / "given", "refresh")[0]["layer_isolated"] != refresh["layer_isolated"]
    assert 0.099 < lines_of(tmp_path / "run", "step")[0]["isolated_share"] <= 0.1


@pytest.mark.slow
def test_offload_packing_and_loss_on_every_turn(base: Path, tmp_path: Path) -> None:
    """The settings of a large run, on one skill whose conversations have several turns; then the command again."""
    recipe = write_recipe(
        tmp_path,
        base,
        stages=[{"name": "dialogue", "data": {"skill": "dialogue", "rows": 96}, "epochs": 2}],
        train={
            "deepspeed": "zero3_offload",
            "packing": True,
            "max_length": 256,
            "assistant_only_loss": True,
            "gradient_checkpointing": True,
            "save_steps": 1,
            "save_total_limit": 2,
        },
    )
    checked(epi_ds("train", str(recipe), num_ranks=RANKS))
    steps = lines_of(tmp_path / "run", "step")
    assert steps[-1]["isolated"] > 0
    assert steps[-1]["loss"] < steps[0]["loss"]
    # Packed: far fewer sequences than the 192 rows.
    assert len(steps) < 20
    committed = [found.step for found in RunFolder(tmp_path / "run").complete_checkpoints()]
    assert committed == [len(steps) - 1, len(steps)]
    # A finished run says so, and none of its files changes; least of all to say what it was not trained with.
    untouched = digests(tmp_path / "run")
    assert "has ended" in checked(epi_ds("train", str(recipe)))
    assert "method.epi.ratio was 0.1, is 0.3" in checked(epi_ds("train", str(recipe), "method.epi.ratio=0.3"), 2)
    assert digests(tmp_path / "run") == untouched
    # Continued from the checkpoint before, it takes the last step again, on the same packed rows.
    last, before = tmp_path / "run" / "checkpoints" / f"checkpoint-{len(steps)}", tmp_path / "before"
    shutil.move(last, before)
    checked(epi_ds("train", str(recipe), num_ranks=RANKS))
    assert lines_of(tmp_path / "run", "step") == steps
    shards = sorted(str(path.relative_to(before)) for path in before.glob("*/*.pt"))
    assert len(shards) == 2 * RANKS
    for name in shards:
        # Not by their bytes: in a process that has loaded, an optimizer no longer shares its list of betas with the
        # configuration, and a pickle shows that.
        assert_same_content(*(torch.load(folder / name, weights_only=False) for folder in (before, last)))
    assert_same_files(manifest_of(before), manifest_of(last), but=shards)


@pytest.mark.slow
def test_a_killed_command_leaves_no_rank_behind(base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base)
    command = subprocess.Popen([str(Path(sys.prefix) / "bin" / "epi-ds"), "train", str(recipe)])
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    ranks = psutil.Process(command.pid).children(recursive=True)
    assert len(ranks) >= RANKS + 1  # and the launcher
    command.kill()
    command.wait()
    _, alive = psutil.wait_procs(ranks, timeout=60)
    for process in alive:
        process.kill()
    assert not alive


@pytest.mark.slow
def test_a_resume_with_other_rows_is_refused_before_training(resumed: Path, tmp_path: Path) -> None:
    shutil.copytree(resumed, tmp_path / "copy")
    finished = run_epi_ds(
        "train", str(resumed / "recipe.yaml"), f"output={tmp_path / 'copy' / 'run'}", "stages.0.data.rows=24", "ranks=1"
    )
    checked(finished, 2)
    assert "belongs to another recipe" in finished.output
    assert "--restart" in finished.output


@pytest.mark.slow
def test_another_number_of_ranks_continues_the_run(uninterrupted: Path, tmp_path: Path) -> None:
    """From a checkpoint of two ranks in the second stage, one rank trains on, on the same rows."""
    shutil.copytree(uninterrupted, tmp_path / "copy")
    run = tmp_path / "copy" / "run"
    for later in range(NEWEST_CHECKPOINT + 1, TOTAL_STEPS + 1):
        shutil.rmtree(run / "checkpoints" / f"checkpoint-{later}", ignore_errors=True)
    command = ["train", str(uninterrupted / "recipe.yaml"), f"output={run}", "ranks=1"]
    refused = epi_ds(*command, num_ranks=1)
    checked(refused, 2)
    assert "set micro-batch 2 and gradient_accumulation_steps 4" in refused.output
    checked(epi_ds(*command, f"train.gradient_accumulation_steps={ACCUMULATION * RANKS}", num_ranks=1))
    before, after = lines_of(uninterrupted / "run", "step"), lines_of(run, "step")
    assert [line["step"] for line in after] == [line["step"] for line in before]
    # Gradients are summed in another order, and Adam divides by what may be small. One row more or less shows by 0.1.
    for one, other in zip(before, after, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3), one["step"]
        assert other["learning_rate"] == one["learning_rate"]
    # The same budget, and of two dozen thousand entries about the same ones.
    first, second = lines_of(uninterrupted / "run", "refresh"), lines_of(run, "refresh")
    for one, other in zip(first, second, strict=True):
        assert other["step"] == one["step"]
        assert other["isolated"] == pytest.approx(one["isolated"], rel=1e-2)


@pytest.mark.slow
def test_bf16_without_a_gpu_is_refused_in_a_sentence(base: Path, tmp_path: Path) -> None:
    finished = run_epi_ds("train", str(write_recipe(tmp_path, base)), "train.bf16=true", "ranks=1")
    assert finished.exit_code != 0
    assert "error: train.bf16: transformers trains in bf16 on GPUs only" in finished.output
    assert "Traceback" not in finished.output


def test_all_misspelt_keys_are_named_before_anything_is_loaded() -> None:
    finished = run_epi_ds("train", "demo", "trian.seed=1", "method.epi.rato=0.1", "train.learning_rat=1")
    checked(finished, 2)
    for wrong, right in {"trian": "train", "rato": "ratio", "learning_rat": "learning_rate"}.items():
        assert wrong in finished.output
        assert right in finished.output
    assert "Traceback" not in finished.output
