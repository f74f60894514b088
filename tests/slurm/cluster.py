"""A real Slurm of two nodes on this host: the rehearsal cluster of docker/slurm, without containers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from epi_ds.launch.local import free_port
from tests.support.processes import checked, run_command

ENTRYPOINT = Path(__file__).resolve().parents[2] / "docker" / "slurm" / "entrypoint.sh"
NODES = ("n1", "n2")
# A requeued job waits for old credentials to expire; a lost node is noticed after half a minute.
PATIENCE = 180


# A job is SIGNALING while a signal to it is on its way.
_ON_THE_WAY = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SIGNALING")


class Cluster:
    """Runs Slurm's commands, and takes nodes away."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._machines: dict[str, subprocess.Popen[bytes]] = {}
        self._ports = {name: free_port() for name in ("controller", *NODES)}
        self.environment = {"SLURM_CONF": str(folder / "controller" / "slurm.conf")}

    def start(self, machine: str) -> None:
        """Start the controller, or a node."""
        local = self._folder / machine
        local.mkdir(parents=True, exist_ok=True)
        environment = {
            "CLUSTER_SHARED": str(self._folder / "shared"),
            "CLUSTER_LOCAL": str(local),
            "CLUSTER_CONTROLLER": os.uname().nodename.partition(".")[0],
            "CLUSTER_CONTROLLER_ADDRESS": "127.0.0.1",
            "CLUSTER_CONTROLLER_PORT": str(self._ports["controller"]),
            "CLUSTER_NODES": " ".join(f"{node}=127.0.0.1:{self._ports[node]}" for node in NODES),
            "CLUSTER_NODE": machine,
            # Pretended: room for several jobs.
            "CLUSTER_CPUS": "8",
        }
        # Jobs inherit nothing from here but what sbatch passes on.
        with (local / "log").open("ab") as log:
            self._machines[machine] = subprocess.Popen(
                [str(ENTRYPOINT), "controller" if machine == "controller" else "node"],
                env={**os.environ, **environment, "SLURM_CONF": str(local / "slurm.conf")},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def run(self, *command: str) -> str:
        """Run one of Slurm's commands; return what it prints."""
        return checked(run_command(command, timeout=60)).strip()

    def wait_for(self, what: str, job: str, *states: str) -> None:
        """Wait until a job is in one of some states."""
        deadline = time.monotonic() + PATIENCE
        while (state := self.state(job)) not in states:
            assert time.monotonic() < deadline, f"{what}: job {job} is {state}, and was to be {states}\n{self.logs()}"
            time.sleep(0.2)

    def state(self, job: str) -> str:
        """Return a job's state."""
        return self._of(job, "JobState")

    def restarts(self, job: str) -> int:
        """Return how often a job was queued again."""
        return int(self._of(job, "Restarts"))

    def _of(self, job: str, name: str) -> str:
        fields = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return next(field.partition("=")[2] for field in fields if field.startswith(f"{name}="))

    def finish(self, job: str) -> None:
        """Wait for a job's good end, however often it is queued again; do not let it wait for old credentials."""
        deadline = time.monotonic() + PATIENCE
        while (state := self.state(job)) != "COMPLETED":
            assert state in _ON_THE_WAY, f"job {job} is {state}\n{self.logs()}"
            assert time.monotonic() < deadline, f"job {job} is {state}\n{self.logs()}"
            time.sleep(0.2)

    def ranks_of(self, job: str) -> dict[str, psutil.Process]:
        """Return a job's ranks by node."""
        return {
            variables["SLURMD_NODENAME"]: process
            for process, variables in self._processes()
            if variables.get("SLURM_JOB_ID") == job
            # srun has these words on its command line too.
            and process.name() != "srun"
            and "epi_ds.launch.rank" in process.cmdline()
        }

    def wait_for_processes(self, job: str) -> None:
        """Wait until nothing of a job runs any more, its batch script included."""
        deadline = time.monotonic() + PATIENCE
        while left := [one.pid for one, variables in self._processes() if variables.get("SLURM_JOB_ID") == job]:
            assert time.monotonic() < deadline, f"processes {left} of job {job} do not end\n{self.logs()}"
            time.sleep(0.2)

    def lose(self, node: str) -> None:
        """Have a node break down: its daemons and everything that runs there die at once."""
        own = str(self._folder / node / "slurm.conf")
        for process, variables in list(self._processes()):
            is_daemon = variables["SLURM_CONF"] == own and process.name().startswith("slurm")
            if is_daemon or variables.get("SLURMD_NODENAME") == node:
                with suppress(psutil.Error):
                    process.kill()
        os.killpg(self._machines.pop(node).pid, signal.SIGKILL)

    def _processes(self) -> Iterator[tuple[psutil.Process, dict[str, str]]]:
        """Yield this cluster's processes, with their environments."""
        for process in psutil.process_iter():
            # Those that end meanwhile.
            with suppress(psutil.Error):
                variables = process.environ()
                if variables.get("SLURM_CONF", "").startswith(f"{self._folder}/"):
                    yield process, variables

    def logs(self) -> str:
        """Return the end of the controller's log, for a failure's message."""
        return (self._folder / "controller" / "log").read_text()[-3000:]

    def stop(self) -> None:
        """End all of it."""
        for machine in reversed(list(self._machines)):
            self._machines[machine].terminate()
        for process in self._machines.values():
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Yield a cluster whose nodes are idle."""
    # Not in a folder of pytest's: munged wants everybody to reach its socket.
    folder = Path(tempfile.mkdtemp(prefix="epi_ds_slurm_"))
    folder.chmod(0o755)
    cluster = Cluster(folder)
    for machine in ("controller", *NODES):
        cluster.start(machine)
    try:
        deadline = time.monotonic() + 30
        while _idle(cluster.environment) < len(NODES):
            assert time.monotonic() < deadline, cluster.logs()
            time.sleep(0.2)
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _idle(environment: Mapping[str, str]) -> int:
    command: Sequence[str] = ["sinfo", "--noheader", "--Node", "--partition=main", "--format=%T"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    return done.stdout.split().count("idle")
