"""The scripts that install: what is missing and nothing else, and what the images copy is enough for epi-ds to work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.docker.dockerfiles import DOCKERFILES, ROOT, copied
from tests.support.processes import Finished, checked, run_command

INSTALL_SYSTEM = ROOT / "docker" / "install_system.sh"
debian = pytest.mark.skipif(
    shutil.which("apt-get") is None or shutil.which("dpkg-query") is None, reason="neither Debian nor Ubuntu"
)


def _install_system(*groups: str, **variables: str) -> Finished:
    return run_command(["env", *(f"{name}={value}" for name, value in variables.items()), str(INSTALL_SYSTEM), *groups])


def _database(folder: Path, *packages: str, status: str = "install ok installed") -> str:
    """Make dpkg's record of a machine that has nothing but these packages."""
    entries = [
        f"Package: {package}\nStatus: {status}\nVersion: 1\nArchitecture: all\nMaintainer: nobody\nDescription: none\n"
        for package in packages
    ]
    (folder / "status").write_text("\n".join(entries))
    return str(folder)


@debian
def test_it_names_what_is_missing(tmp_path: Path) -> None:
    output = checked(_install_system("build", "slurm", DRY_RUN="1", DPKG_ADMINDIR=_database(tmp_path, "make", "munge")))
    assert (
        output.split() == "would install g++ python3-dev python3-venv slurm-wlm slurmd slurmctld slurm-client".split()
    )


@debian
def test_a_removed_package_is_missing_although_its_configuration_is_there(tmp_path: Path) -> None:
    folder = _database(tmp_path, "libaio-dev", status="deinstall ok config-files")
    assert "would install libaio-dev" in checked(_install_system("nvme", DRY_RUN="1", DPKG_ADMINDIR=folder))


@debian
def test_it_does_nothing_where_everything_is_installed(tmp_path: Path) -> None:
    folder = _database(tmp_path, "openmpi-bin", "libopenmpi-dev", "chromium")
    output = checked(_install_system("mpi", "browser", DPKG_ADMINDIR=folder))
    assert output == "all packages of mpi browser are installed\n"


@debian
def test_it_does_nothing_on_a_machine_that_has_everything() -> None:
    groups = ("build", "nvme", "mpi", "slurm", "browser")
    present = [group for group in groups if "would" not in checked(_install_system(group, DRY_RUN="1"))]
    if not present:
        pytest.skip("no group is installed whole on this machine")
    assert checked(_install_system(*present)) == f"all packages of {' '.join(present)} are installed\n"


@debian
@pytest.mark.parametrize("groups", [(), ("build", "gpu")])
def test_it_refuses_a_group_that_does_not_exist(groups: tuple[str, ...]) -> None:
    output = checked(_install_system(*groups, DRY_RUN="1"), exit_code=1)
    assert "build, nvme, mpi, slurm" in output
    assert "would install" not in output


@debian
def test_who_is_not_root_is_told_what_to_do(tmp_path: Path) -> None:
    command = ["bash", "-s", "mpi"]
    done = subprocess.run(
        command,
        # On standard input: others may not be allowed to read the checkout.
        stdin=INSTALL_SYSTEM.open(),
        capture_output=True,
        text=True,
        cwd="/",
        env={**os.environ, "DPKG_ADMINDIR": "/nonexistent"},
        user="nobody" if os.geteuid() == 0 else None,
    )
    assert done.returncode == 1
    assert "sudo apt-get install openmpi-bin libopenmpi-dev" in done.stderr


def test_make_install_and_ci_use_the_scripts() -> None:
    makes = checked(run_command(["make", "--dry-run", "--always-make", "install", "PYTHON=python3.99"], cwd=ROOT))
    assert 'PYTHON="python3.99" docker/install_python.sh .venv dev,docs,eval,study,train' in makes.splitlines()
    assert "pip install" not in makes
    ci = (ROOT / ".ci" / "run").read_text()
    assert "docker/install_system.sh browser nvme mpi slurm" in ci
    assert "apt-get install" not in ci


def _checkout(folder: Path, dockerfile: Path) -> Path:
    """Make what an image has of the repository."""
    for source in copied(dockerfile):
        target = folder / source
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, target)
    return folder


def _install_python(checkout: Path, venv: Path, *extras: str, **variables: str) -> Finished:
    settings = [f"{name}={value}" for name, value in variables.items()]
    return run_command(["env", *settings, str(checkout / "docker" / "install_python.sh"), str(venv), *extras])


def _packages(venv: Path) -> Path:
    return Path(sysconfig.get_path("purelib", vars={"base": str(venv)}))


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an environment with epi-ds in it, made of what the image for CPUs copies, which is gone."""
    checkout = _checkout(tmp_path_factory.mktemp("checkout"), next(path for path in DOCKERFILES if "cpu" in path.name))
    folder = tmp_path_factory.mktemp("environment") / "venv"
    steps = {"STEPS": "environment project", "EDITABLE": "no", "PIP_NO_DEPS": "1"}
    checked(_install_python(checkout, folder, PYTHON=sys.executable, **steps))
    shutil.rmtree(checkout)
    # What it depends on is that of the environment which runs the tests; its own epi-ds is not seen this way.
    (_packages(folder) / "dependencies.pth").write_text(str(_packages(Path(sys.prefix))))
    return folder


@pytest.mark.slow
def test_an_environment_has_all_of_epi_ds(venv: Path, tmp_path: Path) -> None:
    program = "import epi_ds, epi_ds.ds_configs, epi_ds.launch.local; print(epi_ds.__file__)"
    elsewhere = ["env", "--unset=PYTHONPATH", f"--chdir={tmp_path}"]
    place = Path(checked(run_command([*elsewhere, str(venv / "bin" / "python"), "-c", program])).strip()).parent
    assert place.is_relative_to(venv)
    assert "Usage: epi-ds" in checked(run_command([*elsewhere, str(venv / "bin" / "epi-ds"), "--help"]))
    # Files that are no modules are installed only if pyproject.toml names them; run from the sources, nobody notices.
    for folder, installed in {
        "epi_ds": ".",
        "kernels": "kernels",
        "launch": "launch",
        "ds_configs": "ds_configs",
    }.items():
        files = [path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*") if path.is_file()]
        missing = [path for path in files if path.suffix != ".pyc" and not (place / installed / path).exists()]
        assert not missing, f"{folder}: {missing}"


@pytest.mark.slow
def test_dependencies_are_those_of_the_project_in_their_pinned_versions(venv: Path, tmp_path: Path) -> None:
    (tmp_path / "docker").mkdir()
    shutil.copy(ROOT / "docker" / "install_python.sh", tmp_path / "docker")
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "other"\ndependencies = ["iniconfig>=2"]\n'
        '[project.optional-dependencies]\none = ["pluggy"]\ntwo = ["six"]\nthree = ["packaging"]\n'
    )
    (tmp_path / "constraints.txt").write_text("iniconfig==2.1.0\npluggy==1.5.0\nsix==1.16.0\n")
    checked(_install_python(tmp_path, venv, "one,two", STEPS="dependencies"))
    listing = [str(venv / "bin" / "pip"), "list", "--format=freeze", "--path", str(_packages(venv))]
    listed = checked(run_command(listing)).splitlines()
    assert {"iniconfig==2.1.0", "pluggy==1.5.0", "six==1.16.0"} <= set(listed)
    assert not any(line.startswith("packaging=") for line in listed)
    refused = _install_python(tmp_path, venv, "four", STEPS="dependencies")
    assert refused.exit_code != 0
    assert "'four'" in refused.output


@pytest.mark.parametrize(
    ("variables", "rule"),
    [({"STEPS": "everything"}, "everything"), ({"EDITABLE": "1", "STEPS": "project"}, "yes or no")],
)
def test_it_refuses_what_it_does_not_know(tmp_path: Path, variables: dict[str, str], rule: str) -> None:
    finished = _install_python(ROOT, tmp_path / "venv", **variables)
    assert rule in checked(finished, exit_code=1)
    assert not (tmp_path / "venv").exists()
