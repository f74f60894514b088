"""What can be known of the images without an engine that builds them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docker.dockerfiles import DOCKERFILES, ROOT, all_of, copied, instructions
from tests.support.processes import checked, run_command

SCRIPTS = [*sorted((ROOT / "docker").rglob("*.sh")), ROOT / ".ci" / "run"]
COMPOSE = ROOT / "docker" / "compose.slurm.yaml"

each_dockerfile = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_their_linter(script: Path) -> None:
    checked(run_command(["bash", "-n", str(script)]))
    checked(run_command(["shellcheck", str(script)]))
    assert os.access(script, os.X_OK)


@each_dockerfile
def test_dockerfiles_pass_their_linter(dockerfile: Path) -> None:
    checked(run_command(["hadolint", "--no-color", str(dockerfile)]))


@each_dockerfile
def test_base_images_are_pinned(dockerfile: Path) -> None:
    for image in all_of(dockerfile, "FROM"):
        # A release of the distribution or of CUDA, not merely its name.
        assert re.fullmatch(r"[a-z/]+:\d+\.\d+[\w.-]*", image), image


@each_dockerfile
def test_what_is_copied_reaches_the_builder(dockerfile: Path) -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    for source in copied(dockerfile):
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignored, source


@each_dockerfile
def test_scripts_are_copied_before_they_run(dockerfile: Path) -> None:
    there: set[str] = set()
    for name, arguments in instructions(dockerfile):
        if name == "COPY":
            there.update(arguments.split()[:-1])
        elif name == "RUN":
            assert there.issuperset(re.findall(r"docker/\S+\.sh", arguments)), arguments
            # Its packages stand in install_system.sh alone.
            assert "apt" not in arguments


@each_dockerfile
def test_sources_are_copied_after_torch_is_installed(dockerfile: Path) -> None:
    order = instructions(dockerfile)
    installs = [place for place, (name, arguments) in enumerate(order) if name == "RUN" and " torch " in arguments]
    sources = [place for place, (name, arguments) in enumerate(order) if (name, arguments) == ("COPY", "epi_ds epi_ds")]
    assert len(installs) == len(sources) == 1
    assert installs < sources


@each_dockerfile
def test_commands_run_as_they_are_given_and_not_as_root(dockerfile: Path) -> None:
    # NVIDIA's images have an entrypoint, which only an empty one takes away.
    inherits = all_of(dockerfile, "FROM")[-1].startswith("nvidia/")
    assert all_of(dockerfile, "ENTRYPOINT") == (["[]"] if inherits else [])
    user = all_of(dockerfile, "USER")[-1]
    assert int(user) > 0
    assert f"useradd --uid {user} " in " ".join(all_of(dockerfile, "RUN"))
    environment = re.findall(r"install_python\.sh (\S+)", " ".join(all_of(dockerfile, "RUN")))
    assert len(set(environment)) == 1
    assert f"PATH={environment[0]}/bin:$PATH" in all_of(dockerfile, "ENV")


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    described = yaml.safe_load(COMPOSE.read_text())
    assert set(described["volumes"]) == {"runs"}
    found: dict[str, Any] = described["services"]
    return found


def test_the_cluster_has_a_controller_and_two_nodes(services: dict[str, Any]) -> None:
    roles = {name: service["command"][-1] for name, service in services.items()}
    assert roles == {"controller": "controller", "n1": "node", "n2": "node"}
    for name, service in services.items():
        # What entrypoint.sh knows a machine by, where it is told nothing else.
        assert service["hostname"] == name
        assert "entrypoint" not in service
        assert name == "controller" or service["depends_on"] == ["controller"]
    defaults = (ROOT / "docker" / "slurm" / "entrypoint.sh").read_text()
    assert "CLUSTER_CONTROLLER:=controller}" in defaults
    assert "CLUSTER_NODES:=n1 n2}" in defaults


def test_the_machines_of_the_cluster_are_of_one_image(services: dict[str, Any]) -> None:
    builds = [service["build"] for service in services.values()]
    assert all(build == builds[0] for build in builds)
    assert len({service["image"] for service in services.values()}) == 1
    dockerfile = (COMPOSE.parent / builds[0]["context"] / builds[0]["dockerfile"]).resolve()
    assert dockerfile in DOCKERFILES
    arguments = {argument.split("=")[0] for argument in all_of(dockerfile, "ARG")}
    assert arguments.issuperset(builds[0]["args"])


def test_the_machines_find_their_entrypoint_and_share_their_runs(services: dict[str, Any]) -> None:
    for service in services.values():
        # From where in the container to what it is.
        mounts = {volume.split(":")[1]: volume.split(":")[0] for volume in service["volumes"]}
        program = Path(service["command"][0])
        entrypoint = COMPOSE.parent / mounts[str(program.parent)] / program.name
        assert os.access(entrypoint, os.X_OK)
        assert (entrypoint.parent / "slurm.conf.template").exists()
        text = entrypoint.read_text()
        assert "CLUSTER_SHARED:=/runs/" in text
        assert mounts["/runs"] == "runs"
        local = re.search(r"CLUSTER_LOCAL:=([^}]+)\}", text)
        assert local is not None
        assert service["environment"]["SLURM_CONF"] == f"{local.group(1)}/slurm.conf"
