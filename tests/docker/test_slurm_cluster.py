"""The rehearsal cluster, from the script that its containers run: three machines on this host, ended one by one."""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from epi_ds.launch.local import free_port
from tests.docker.dockerfiles import ROOT
from tests.support.processes import Finished, checked, run_command

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        any(shutil.which(program) is None for program in ("slurmctld", "slurmd", "munged", "srun")),
        reason="no Slurm (as root: docker/install_system.sh slurm)",
    ),
]

# As in the image, nobody is root. Slurm wants a user that has a name.
USER = "daemon"
AS_USER = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"] if os.geteuid() == 0 else []


class Cluster:
    """Three machines, each of which is the entrypoint of its container, and commands on the first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.machines: dict[str, psutil.Popen] = {}
        self._environment = {
            "PATH": os.environ["PATH"],
            "CLUSTER_SHARED": str(folder / "shared"),
            "CLUSTER_CONTROLLER": socket.gethostname().split(".")[0],
            "CLUSTER_CONTROLLER_ADDRESS": "127.0.0.1",
            "CLUSTER_CONTROLLER_PORT": str(free_port()),
            "CLUSTER_NODES": " ".join(f"{name}=127.0.0.1:{free_port()}" for name in ("n1", "n2")),
        }

    def start(self, name: str) -> None:
        role = "controller" if name == "controller" else "node"
        own = {"CLUSTER_LOCAL": str(self.folder / name), "CLUSTER_NODE": name}
        with (self.folder / f"{name}.log").open("ab") as log:
            self.machines[name] = psutil.Popen(
                [*AS_USER, str(self.folder / "slurm" / "entrypoint.sh"), role],
                env={**self._environment, **own},
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )

    def processes(self, name: str) -> list[psutil.Process]:
        machine = psutil.Process(self.machines[name].pid)
        return [machine, *machine.children(recursive=True)]

    def ask(self, *command: str) -> Finished:
        settings = f"SLURM_CONF={self.folder / 'controller' / 'slurm.conf'}"
        return run_command([*AS_USER, "env", settings, *command], timeout=60, cwd=self.folder)

    def wait_for(self, what: str, is_so: Callable[[], bool], *, seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not is_so():
            logs = [f"{path.name}:\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log"))]
            assert time.monotonic() < deadline, "\n".join([f"{what}: not so after {seconds} s", *logs])
            time.sleep(0.1)

    def is_idle(self) -> bool:
        # Until the controller answers, sinfo says that it does not.
        states = self.ask("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T").output
        return states.split() == ["idle", "idle"]

    def runs_tasks(self) -> bool:
        # Asks the nodes themselves: the controller believes in one that has just died.
        return self.ask("srun", "--quiet", "--immediate=5", "-N2", "true").exit_code == 0

    def end(self) -> None:
        for machine in self.machines.values():
            if machine.poll() is None:
                machine.terminate()
        psutil.wait_procs(list(self.machines.values()), timeout=30)
        # Steps of jobs outlive the machine that started them, and are nobody's children then.
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if any(value.startswith(f"{self.folder}/") for value in process.environ().values()):
                    process.kill()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Not in pytest's own folder, which other users cannot enter and whose name is too long for that of a socket.
    folder = Path(tempfile.mkdtemp(prefix="cluster-"))
    folder.chmod(0o755)
    shutil.copytree(ROOT / "docker" / "slurm", folder / "slurm")
    if AS_USER:
        shutil.chown(folder, USER, USER)
    made = Cluster(folder)
    try:
        # The nodes first: they wait for the controller's key.
        for name in ("n1", "n2", "controller"):
            made.start(name)
        made.wait_for("both nodes are idle", made.is_idle)
        yield made
    finally:
        made.end()
        shutil.rmtree(folder)


def test_tasks_run_on_both_nodes(cluster: Cluster) -> None:
    tasks = checked(cluster.ask("srun", "--quiet", "-N2", "printenv", "SLURMD_NODENAME"))
    assert sorted(tasks.split()) == ["n1", "n2"]
    assert checked(cluster.ask("srun", "--quiet", "-N2", "hostname")).split() == [socket.gethostname()] * 2


def test_settings_are_those_of_a_site(cluster: Cluster) -> None:
    shown = checked(cluster.ask("scontrol", "show", "config"))
    settings = dict(re.findall(r"^(\w+) *= (.*?) *$", shown, flags=re.MULTILINE))
    assert settings["KillWait"] == "30 sec"
    assert settings["RequeueExit"] == "(null)"
    assert settings["PreemptType"] == "preempt/partition_prio"
    assert settings["ProctrackType"] == "proctrack/linuxproc"
    assert settings["TaskPlugin"] == "task/none"
    own = [
        value for name, value in settings.items() if name in ("SlurmctldPidFile", "SlurmdSpoolDir", "StateSaveLocation")
    ]
    assert all(value.startswith(str(cluster.folder)) for value in own)


def test_an_urgent_job_requeues_one_of_main(cluster: Cluster) -> None:
    cluster.wait_for("both nodes are idle", cluster.is_idle)
    script = ["--wrap", "srun sleep 600", "--output", str(cluster.folder / "shared" / "%j.log")]
    job = checked(cluster.ask("sbatch", "--parsable", "-N2", "--exclusive", *script)).strip()

    def state() -> str:
        return cluster.ask("scontrol", "--oneliner", "show", "job", job).output

    cluster.wait_for("the job runs", lambda: "JobState=RUNNING" in state())
    checked(cluster.ask("srun", "--quiet", "--partition=urgent", "-N2", "--exclusive", "true"))
    assert "JobState=PENDING" in state()
    assert "Restarts=1" in state()
    checked(cluster.ask("scancel", job))


@pytest.mark.slow
def test_a_machine_that_is_told_to_end_ends_all_that_it_started(cluster: Cluster) -> None:
    processes = cluster.processes("n1")
    assert {"slurmd", "munged"} <= {process.name() for process in processes}
    cluster.machines["n1"].terminate()
    assert cluster.machines["n1"].wait(timeout=30) == 0
    assert not [process for process in processes if process.is_running()]
    cluster.start("n1")
    cluster.wait_for("both nodes run tasks", cluster.runs_tasks)


@pytest.mark.slow
def test_a_machine_that_was_killed_comes_back(cluster: Cluster) -> None:
    # Otherwise the controller waits for the end of a job that this machine knows nothing of any more.
    cluster.wait_for("both nodes are idle", cluster.is_idle)
    # The entrypoint first, which would end the others itself.
    for process in cluster.processes("n2"):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    cluster.machines["n2"].wait()
    assert (cluster.folder / "n2" / "munge" / "socket").exists()
    cluster.start("n2")
    cluster.wait_for("both nodes run tasks", cluster.runs_tasks)


@pytest.mark.slow
def test_a_machine_whose_daemon_ends_ends(cluster: Cluster) -> None:
    cluster.wait_for("both nodes are idle", cluster.is_idle)
    processes = cluster.processes("n2")
    (munged,) = [process for process in processes if process.name() == "munged"]
    munged.terminate()
    cluster.machines["n2"].wait(timeout=30)
    assert not [process for process in processes if process.is_running()]
    cluster.start("n2")
    cluster.wait_for("both nodes run tasks", cluster.runs_tasks)


@pytest.mark.parametrize(
    ("role", "settings", "rule"),
    [
        ("worker", {}, "must be controller or node"),
        ("node", {"CLUSTER_PATIENCE": "0"}, "no key of the controller in .*munge.key after 0 s"),
        ("controller", {"CLUSTER_NODES": "nowhere.invalid", "CLUSTER_PATIENCE": "0"}, "no address of nowhere.invalid"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, role: str, settings: dict[str, str], rule: str) -> None:
    folders = {"CLUSTER_SHARED": str(tmp_path / "shared"), "CLUSTER_LOCAL": str(tmp_path / "local")}
    variables = [f"{name}={value}" for name, value in {**folders, **settings}.items()]
    entrypoint = str(ROOT / "docker" / "slurm" / "entrypoint.sh")
    output = checked(run_command(["env", *variables, entrypoint, role], timeout=60), exit_code=1)
    assert re.search(rule, output)
