"""`make test` has every real component and every promise in it at least once, and no more that takes long."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Where an id ends in a file or a function, all that is in it.
COMPONENTS = {
    "ZeRO-3, 1 rank": "tests/zero3/test_hold.py::test_isolated_entries_do_not_move[1-",
    "ZeRO-3, 2 ranks": "tests/zero3/test_hold.py::test_isolated_entries_do_not_move[2-",
    "ZeRO-3, 3 ranks": "tests/zero3/test_hold.py::test_isolated_entries_do_not_move[3-",
    "ZeRO-3, 4 ranks": "tests/zero3/test_hold.py::test_isolated_entries_do_not_move[4-",
    "DeepSpeed's launcher": "tests/end_to_end/test_demo.py",
    "NVMe": "tests/zero3/test_placements.py::test_ratio_zero_is_plain_zero3_with_nvme",
    "MPI": "tests/end_to_end/test_doctor.py::test_processes_of_mpirun_print_one_report",
    "Slurm, its daemons": "tests/docker/test_slurm_cluster.py::test_tasks_run_on_both_nodes",
    "Slurm, a preempted job": "tests/docker/test_slurm_cluster.py::test_an_urgent_job_requeues_one_of_main",
    "Slurm, a job that trains": "tests/slurm/test_slurm.py::test_a_job_that_is_cancelled_saves_and_does_not_come_back",
    "a browser": "tests/end_to_end/test_demo.py::test_the_report_opens_in_a_browser",
    "a trainer": "tests/compatibility/test_compatibility.py::test_trainer_resumes_a_saved_folder",
    "an adapter": "tests/zero3/test_models.py::test_an_adapter_alone_is_covered_and_that_is_said_once",
    "a mixture of experts": "tests/zero3/test_models.py::test_unused_experts_of_mixtral_only_decay",
    "an architecture of transformers": "tests/zero3/test_backbones.py::test_backbone[llama]",
    "a compiler": "tests/kernels/test_observe.py::test_a_compiler_that_fails_says_what_it_said",
    "Triton": "tests/kernels/test_gpu_interpreted.py",
    "the installation": "tests/docker/test_install.py::test_it_does_nothing_on_a_machine_that_has_everything",
    "the lint of scripts and images": "tests/docker/test_images.py",
}
PROMISES = {
    "the demo": "tests/end_to_end/test_demo.py",
    "sharded": "tests/zero3/test_memory.py::test_memory_shrinks_with_the_world",
    "exact: isolated weights do not move": "tests/zero3/test_hold.py::test_isolated_entries_do_not_move",
    "exact: ratio 0 is plain ZeRO-3": "tests/zero3/test_ratio_zero.py::test_ratio_zero_is_plain_zero3",
    "exact: an audit proves it": "tests/zero3/test_resume.py::test_audit_finds_held_weights_and_a_moved_one",
    "agreed: any world size and transport": (
        "tests/zero3/test_masks.py::test_masks_do_not_depend_on_the_world_size_or_the_transport"
    ),
    "agreed: the masks are the definition's": "tests/zero3/test_masks.py::test_masks_of_a_run_equal_the_oracle",
    "resumable, to the bit": "tests/zero3/test_resume.py::test_resume_is_bit_exact",
    "resumable, on any number of ranks": "tests/zero3/test_reshard.py::test_any_number_of_ranks_continues_any_other",
    "whole or absent": (
        "tests/zero3/test_checkpoints.py::test_a_save_that_fails_leaves_the_one_before_and_training_goes_on"
    ),
    "a damaged checkpoint is passed over": (
        "tests/zero3/test_checkpoints.py::test_what_is_damaged_is_passed_over_and_named"
    ),
    "a skipped step leaves no trace": "tests/zero3/test_skip.py::test_a_nan_leaves_no_trace",
    "released entries do not jump": "tests/zero3/test_release.py::test_released_entries_do_not_jump",
    "finished stages are remembered": "tests/zero3/test_schedules.py::test_tasks_share_the_budget",
    "a recipe goes on at the row where it stopped": (
        "tests/compatibility/test_compatibility.py::test_recipe_resumes_a_saved_run"
    ),
    "a trainer's script goes on": "tests/compatibility/test_compatibility.py::test_trainer_resumes_a_saved_folder",
    "who is told to end saves and stops": "tests/end_to_end/test_demo.py::test_it_was_stopped_and_repeated_no_step",
    "a lost rank ends the run": "tests/end_to_end/test_lost_ranks.py::test_a_lost_rank_ends_the_run[killed]",
    "an export is the model": "tests/end_to_end/test_checkpoints.py::test_export_is_the_model",
    "presets": "tests/unit/test_ds_configs.py::test_deepspeed_gets_what_was_read",
    "mistakes in a recipe are named at once": (
        "tests/end_to_end/test_train.py::test_all_misspelt_keys_are_named_before_anything_is_loaded"
    ),
    "mistakes on the command line are named": (
        "tests/end_to_end/test_bench.py::test_a_state_that_does_not_exist_is_refused"
    ),
    "the kernels give the reference's bits": "tests/kernels/test_observe.py::test_bits_are_those_of_the_reference",
}


@pytest.fixture(scope="module")
def first_tier() -> list[str]:
    """The ids of the tests of the first tier, but for those of units, of which nothing is said here but by name."""
    listed = {path.partition("::")[0] for path in (*COMPONENTS.values(), *PROMISES.values())}
    folders = {f"tests/{name}" for name in ("docker", "end_to_end", "faults", "slurm", "zero3")}
    files = sorted(path for path in listed if not path.startswith(tuple(folders)))
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *sorted(folders), *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


@pytest.mark.parametrize("name", [*COMPONENTS, *PROMISES])
def test_each_component_and_promise_has_a_scenario_in_the_first_tier(first_tier: list[str], name: str) -> None:
    scenario = (COMPONENTS | PROMISES)[name]
    assert any(one.startswith(scenario) for one in first_tier), f"{scenario} is not there, or is marked slow"


@pytest.mark.parametrize("folder", ["end_to_end", "slurm", "faults"])
def test_nothing_else_that_starts_commands_is_in_the_first_tier(first_tier: list[str], folder: str) -> None:
    scenarios = tuple((COMPONENTS | PROMISES).values())
    others = [one for one in first_tier if one.startswith(f"tests/{folder}/") and not one.startswith(scenarios)]
    assert not others, "mark them slow, or say in this table what they are the scenario of"


def test_make_runs_both_tiers_and_ci_all_of_it() -> None:
    def recipe(target: str) -> list[str]:
        command = ["make", "--dry-run", "--always-make", target]
        lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        return [line for line in lines if "/pytest" in line or "ruff check" in line]

    lint, *first = recipe("test")
    assert "ruff check" in lint
    assert [re.findall('(?:-m|--ignore) ("[^"]*"|\\S+)', line) for line in first] == [
        ['"not slow"'],
        ['"not slow"', "tests/unit", "tests/kernels"],
    ]
    # The same commands without the choice, which therefore run what the first tier runs.
    assert recipe("test-all") == [lint, *(line.replace('"not slow"', '""') for line in first)]
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "make test-all"


def test_late_tests_of_the_second_tier_are_skipped_and_counted() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/unit/test_hub.py"]
    late = {**os.environ, "SLOW_TESTS_BEGIN_UNTIL": "0"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=late)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert re.search(r"SKIPPED \[\d+\] .*SLOW_TESTS_BEGIN_UNTIL had passed", done.stdout)
