"""Which rank a process is, from the variables of every starter, and what is said where they make no sense."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epi_ds.errors import UserError
from epi_ds.launch.rank_environment import (
    Meeting,
    RankEnvironment,
    Source,
    become_rank,
    discover,
    first_of,
    only_rank,
    port_of,
    tasks_per_node,
)

TORCH = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29501"}
# Of two nodes with three and two tasks.
SLURM = {
    "SLURM_JOB_ID": "71",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "3,2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
}
MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def found(environment: dict[str, str], *, resolves: bool = True, told: Meeting | None = None) -> RankEnvironment | None:
    return discover(environment, resolves=lambda host: resolves, parent=4711, ask_mpi=lambda: told)


def test_no_starter_is_no_rank() -> None:
    assert found({}) is None
    # A batch script, and one task of srun or mpirun: they may start ranks of their own.
    batch = {name: value for name, value in SLURM.items() if "STEP" not in name}
    assert found(batch | {"SLURM_PROCID": "0"}) is None
    assert found(SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}) is None
    assert found(MPI | {"OMPI_COMM_WORLD_SIZE": "1"}) is None


def test_torch_s_own_words_are_kept() -> None:
    launcher = found(TORCH | {"LOCAL_SIZE": "4"})
    assert launcher == RankEnvironment(Source.TORCH, 5, 8, 1, 4, "node1", 29501)
    torchrun = found(TORCH | {"LOCAL_WORLD_SIZE": "2"})
    assert torchrun is not None
    assert torchrun.local_size == 2
    assert torchrun.variables().items() >= TORCH.items()


def test_tasks_of_srun_are_ranks() -> None:
    port = port_of("71/0/0")
    assert found(SLURM) == RankEnvironment(Source.SLURM, 4, 5, 1, 2, "gpu07", port)
    # Names that mean nothing outside of Slurm.
    nameless = found(SLURM, resolves=False)
    assert nameless is not None
    assert nameless.master_addr == "10.0.0.7"
    # All ranks meet at one port, and after a requeue at another one.
    first = found(SLURM | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"})
    requeued = found(SLURM | {"SLURM_RESTART_COUNT": "1"})
    assert first is not None
    assert requeued is not None
    assert first.master_port == port != requeued.master_port
    chosen = found(SLURM | {"MASTER_ADDR": "there", "MASTER_PORT": "1234"})
    assert chosen is not None
    assert (chosen.master_addr, chosen.master_port) == ("there", 1234)


def test_processes_of_mpirun_are_ranks() -> None:
    assert found(MPI) == RankEnvironment(Source.MPIRUN, 1, 2, 1, 2, "127.0.0.1", port_of("4711"))
    # Its daemons are tasks of srun within a job, and what they start inherits that.
    assert found(MPI | SLURM) == found(MPI)
    assert found(HYDRA) == found(MPI)
    # srun sets some of these too, and no local ones.
    assert found(SLURM | {"PMI_RANK": "4", "PMI_SIZE": "5"}) == found(SLURM)
    # And torch's variables are of who came last.
    assert found(TORCH | MPI | SLURM | {"CROSS_RANK": "0"}) == found(TORCH)


def test_ranks_of_mpirun_on_several_nodes_ask_where_they_meet() -> None:
    several = MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    with pytest.raises(UserError, match=r"install mpi4py .*-x MASTER_ADDR="):
        found(several)
    assert found(several, told=Meeting("b", 6)) == RankEnvironment(Source.MPIRUN, 1, 2, 0, 1, "b", 6)
    given_place = found(several | {"MASTER_ADDR": "a", "MASTER_PORT": "5"})
    assert given_place == RankEnvironment(Source.MPIRUN, 1, 2, 0, 1, "a", 5)


def test_a_rank_alone_meets_nobody() -> None:
    alone = only_rank()
    assert found(alone.variables()) == alone._replace(source=Source.TORCH)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are missing .*RANK=0, WORLD_SIZE=.unset"),
        ({**TORCH, "RANK": "8"}, "contradict each other: RANK=8, WORLD_SIZE=8"),
        ({**TORCH, "LOCAL_SIZE": "1"}, "contradict each other: .*LOCAL_SIZE=1"),
        ({**TORCH, "MASTER_PORT": "http"}, "MASTER_PORT is 'http', and must be a number"),
        (
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(x3)"},
            "Slurm contradict each other: .*PER_NODE=2.x3.",
        ),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "two"}, "'two' is no list of tasks per node"),
        ({**SLURM, "SLURM_LOCALID": "2"}, "Slurm contradict each other"),
        ({**MPI, "OMPI_COMM_WORLD_RANK": "2"}, "mpirun contradict each other: OMPI_COMM_WORLD_RANK=2"),
        # As a batch script exports them, for all tasks alike.
        ({**SLURM, **TORCH}, "RANK=5, .*SLURM_PROCID=4.*unset RANK, WORLD_SIZE and LOCAL_RANK in the batch script"),
        ({key: value for key, value in SLURM.items() if key != "SLURM_NODEID"}, "SLURM_NODEID is missing"),
    ],
)
def test_what_makes_no_sense_is_shown(environment: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        found(environment)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=6))
def test_tasks_per_node_are_expanded(groups: list[tuple[int, int]]) -> None:
    text = ",".join(f"{tasks}(x{nodes})" if nodes > 1 else str(tasks) for tasks, nodes in groups)
    assert tasks_per_node(text) == [tasks for tasks, nodes in groups for _ in range(nodes)]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("node[007,012-128],login", "node007"),
        ("rack[03-04]-n[10-12],other", "rack03-n10"),
        ("a,b[1-2]", "a"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_of(nodes) == first


def test_ports_are_usable() -> None:
    ports: list[Any] = [port_of(str(key)) for key in range(2000)]
    assert min(ports) >= 20_000
    assert max(ports) < 32_000
    assert len(set(ports)) > 1700


def test_a_task_becomes_a_rank_of_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCH, *SLURM, *MPI, "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    assert not become_rank()
    assert "RANK" not in os.environ
    for name, value in MPI.items():
        monkeypatch.setenv(name, value)
    # So that it is undone.
    for name in (*TORCH, "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    assert become_rank()
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")] == ["1", "2", "1", "2"]
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert become_rank()
