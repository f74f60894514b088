"""``epi-ds launch ... --dry-run``: what is printed is what these files hold, to the character.

After a change that is meant, ``WRITE_GOLDEN=1 pytest tests/unit/test_launch_dry_run.py`` writes them anew: read the
difference before it is committed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from epi_ds.cli.main import app
from epi_ds.errors import UserError
from epi_ds.launch.mpi import PASSED
from epi_ds.launch.slurm import Container, Image, SlurmJob, submit
from epi_ds.launch.stop_signals import REQUEUE_EXIT_CODE
from epi_ds.launch.sweep import variants_of

GOLDEN = Path(__file__).parent / "golden"
RECIPE = {
    "model": {"path": "somewhere"},
    "stages": [
        {"name": "first", "data": {"skill": "logic", "rows": 8}},
        {"name": "second", "data": {"skill": "code", "rows": 8}},
    ],
    "output": "runs/mine",
}
CASES = {
    "slurm_bare": ["slurm", "recipe.yaml", "--nodes", "2", "--gpus-per-node", "8", "--time", "4:00:00"],
    "slurm_everything": [
        *["slurm", "recipe.yaml", "train.learning_rate=1e-5", "stages.first.data.rows=16", "--nodes", "4"],
        *["--ranks-per-node", "2", "--cpus-per-rank", "6", "--time", "2-0", "--partition", "gpu", "--account", "lab"],
        *["--qos", "long", "--memory", "200G", "--option=--exclusive", "--option=--constraint=a100", "--name", "mine"],
        *["--grace", "300", "--retries", "0", "--after", "17"],
    ],
    "slurm_array": [
        *["slurm", "recipe.yaml", "--sweep", "train.seed=0,1", "--sweep", "method.epi.ratio=0.01,0.1"],
        *["--parallel", "2"],
    ],
    "slurm_stages": ["slurm", "recipe.yaml", "--by-stage"],
    "slurm_script": ["slurm", "train.py", "--nodes", "2", "--", "--lr", "1e-5", "a file"],
    "slurm_apptainer": [
        *["slurm", "recipe.yaml", "--gpus-per-node", "1", "--container", "apptainer", "--image", "epi_ds.sif"],
        *["--mount", "/data:/data"],
    ],
    "slurm_pyxis": [
        *["slurm", "recipe.yaml", "--container", "pyxis", "--image", "registry#epi_ds:1", "--mount", "/data:/data"],
        *["--python", "/opt/venv/bin/python"],
    ],
    "mpi": ["mpi", "recipe.yaml", "train.seed=1", "--ranks", "16", "--hosts", "node1:8,node2:8"],
    "mpi_srun": ["mpi", "train.py", "--ranks", "2", "--starter", "srun", "--option=-N2", "--", "--lr", "1e-5"],
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a user, with a recipe and a script."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (tmp_path / "train.py").touch()
    return tmp_path


@pytest.mark.parametrize("name", CASES)
def test_a_dry_run_prints_what_it_always_did(name: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of which mpirun's ranks get some.
    for variable in [name for name in os.environ if PASSED.match(name) and name != "PATH"]:
        monkeypatch.delenv(variable)
    command, *arguments = CASES[name]
    found = CliRunner().invoke(app, ["launch", command, "--dry-run", *arguments], catch_exceptions=False)
    assert found.exit_code == 0
    printed = found.stdout.replace(str(project), "/home/me/project").replace(sys.executable, "/opt/venv/bin/python3")
    file = GOLDEN / f"{name}.txt"
    if "WRITE_GOLDEN" in os.environ:
        file.write_text(printed)
    assert printed == file.read_text()
    # Nothing but that.
    assert sorted(path.name for path in project.iterdir()) == ["recipe.yaml", "train.py"]


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("slurm")])
def test_scripts_are_correct_bash(name: str, project: Path) -> None:
    found = CliRunner().invoke(app, ["launch", *CASES[name]], catch_exceptions=False)
    assert found.exit_code == 0
    scripts = sorted(project.glob("runs/*/slurm/*.sbatch"))
    assert [str(path) for path in scripts] == re.findall(r"^(/\S+\.sbatch)$", found.stdout, re.MULTILINE)
    for path in scripts:
        subprocess.run(["bash", "-n", str(path)], check=True)
        subprocess.run(["shellcheck", str(path)], check=True)


def test_the_last_lines_queue_a_job_again_that_can_go_on(tmp_path: Path) -> None:
    """Run the whole script, with srun and scontrol that write down what they are asked for and end as a job might."""
    programs = tmp_path / "bin"
    programs.mkdir()
    calls = tmp_path / "calls"
    for name, line in (
        ("srun", '[[ "$*" == *build-operators* ]] && exit 0; exit "$CODE"'),
        ("squeue", 'echo "$STATE"'),
        ("scontrol", "exit 0"),
    ):
        (programs / name).write_text(f'#!/bin/bash\necho {name} "$@" >> {calls}\n{line}\n')
        (programs / name).chmod(0o755)

    def requeued(code: int, *, state: str = "RUNNING", variants: tuple[tuple[str, ...], ...] = ()) -> str | None:
        job = SlurmJob("job", ("train.py",), tmp_path, tmp_path, retries=2, variants=variants)
        job.write()
        calls.unlink(missing_ok=True)
        variables = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "1"}
        environment = {"PATH": f"{programs}:{os.environ['PATH']}", "CODE": str(code), "STATE": state, **variables}
        ended = subprocess.run(["bash", str(job.path)], env=environment).returncode
        assert ended == code
        called = calls.read_text().splitlines()
        assert called[1].endswith("train.py" + (" b=2" if variants else ""))
        return next((line for line in called if line.startswith("scontrol")), None)

    assert requeued(0) is None
    # A run that was told to stop goes on, however often, unless somebody has cancelled it, or Slurm queues it again.
    for _ in range(4):
        assert requeued(REQUEUE_EXIT_CODE) == "scontrol requeue 9"
    assert requeued(REQUEUE_EXIT_CODE, state="COMPLETING") is None
    assert requeued(REQUEUE_EXIT_CODE, state="PENDING") is None
    # A mistake of the user's would be made again; what fails otherwise is tried twice more.
    assert requeued(2) is None
    assert [requeued(1), requeued(137), requeued(1)] == ["scontrol requeue 9", "scontrol requeue 9", None]
    assert requeued(1, variants=(("b=1",), ("b=2",))) == "scontrol requeue 9_1"


def test_names_that_sbatch_reads_otherwise_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'my job' has ' ' in it"):
        SlurmJob("my job", ("train.py",), tmp_path, tmp_path)
    with pytest.raises(UserError, match="has '%' in it"):
        SlurmJob("job", ("train.py",), tmp_path / "50%", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["slurm", "train.py", "--sweep", "seed=0,1"], "--sweep goes with a recipe, and train.py is a script"),
        (["slurm", "train.py", "--by-stage"], "--by-stage goes with a recipe"),
        (["slurm", "recipe.yaml", "--by-stage", "--sweep", "train.seed=0,1"], "give one of --by-stage, --sweep"),
        (["slurm", "recipe.yaml", "--sweep", "train.seeds=0,1"], "train.seeds: not an argument of SFTConfig"),
        (["slurm", "recipe.yaml", "--sweep", "train.seed"], "--sweep train.seed: must have the form"),
        (["slurm", "recipe.yaml", "--image", "x.sif"], "--container and --image go together"),
        (["slurm", "recipe.yaml", "--mount", "/a:/a"], "--mount /a:/a would be ignored without --container"),
        (["slurm", "elsewhere.py"], "there is no script elsewhere.py"),
        (["slurm", "recipe.yml"], "there is no recipe file recipe.yml"),
        (["mpi", "recipe.yaml", "--ranks", "2", "--starter", "srun", "--hosts", "a"], "--hosts a would be ignored"),
    ],
)
def test_what_cannot_be_launched_is_refused(arguments: list[str], said: str, project: Path) -> None:
    found = CliRunner().invoke(app, ["launch", *arguments, "--dry-run"])
    assert isinstance(found.exception, UserError)
    assert said in str(found.exception)


def test_each_combination_has_a_folder_of_its_own() -> None:
    assert variants_of(["a.seed=0,1", "b=x/y"], output=Path("out")) == (
        ("a.seed=0", "b=x/y", "output=out/seed-0_b-x-y"),
        ("a.seed=1", "b=x/y", "output=out/seed-1_b-x-y"),
    )
    with pytest.raises(UserError, match=r"several tasks would write into out/b-x-y"):
        variants_of(["b=x/y,x-y"], output=Path("out"))


def test_without_slurm_a_submission_says_where_to_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    job = SlurmJob("job", ("train.py",), tmp_path, tmp_path)
    with pytest.raises(RuntimeError, match="submit from a login node"):
        submit([job])


def test_an_image_needs_a_container() -> None:
    with pytest.raises(UserError, match="go together"):
        Image(Container.PYXIS)
