"""``epi-ds launch``."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from epi_ds.cli.debugging import debug_options
from epi_ds.launch.mpi import Starter
from epi_ds.launch.slurm import Container, Image, SlurmJob, submit_command
from epi_ds.launch.slurm import submit as submit_jobs

app = typer.Typer(help="Start a run's ranks: on this machine, under Slurm or under MPI.", no_args_is_help=True)

Target = Annotated[str, typer.Argument(help="A recipe, by path or name, or a script that ends in .py.")]
Arguments = Annotated[
    list[str] | None,
    typer.Argument(help="Overrides of the recipe, or the script's arguments; after -- those that begin with a dash."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be run, and run nothing.")]


@app.command(epilog="Example: epi-ds launch local recipe.yaml --ranks 8")
def local(
    target: Target,
    arguments: Arguments = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Default: one for each GPU, or 1 without any.")] = None,
) -> None:
    """Start ranks on this machine, under DeepSpeed's node launcher.

    SIGTERM, SIGUSR1 and Ctrl-C reach the ranks, which save and stop with exit code 85; no rank outlives this command.
    """
    from epi_ds.launch.environment import default_ranks, prepare_environment

    prepare_environment()
    from epi_ds.launch.local import run_ranks
    from epi_ds.recipe.launch_target import find_target
    from epi_ds.train.ranks import start_ranks

    found = find_target(target, arguments or [], options=debug_options())
    if found.recipe is not None:
        raise typer.Exit(start_ranks(found.recipe, list(found.command[2:]), num_ranks=ranks))
    raise typer.Exit(run_ranks("epi_ds.launch.rank", found.command, num_ranks=ranks or default_ranks()))


@app.command(epilog="Example: epi-ds launch mpi recipe.yaml --ranks 16 --hosts node1:8,node2:8")
def mpi(
    target: Target,
    arguments: Arguments = None,
    *,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks on all hosts together.")],
    hosts: Annotated[str | None, typer.Option(help="Of mpirun, such as node1:8,node2:8; default this machine.")] = None,
    starter: Annotated[Starter, typer.Option(help="srun: within a Slurm job, by --mpi=pmix.")] = Starter.MPIRUN,
    option: Annotated[list[str] | None, typer.Option(help="Another word for mpirun or srun; may be repeated.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Start ranks under Open MPI's mpirun, or under srun.

    SIGTERM and Ctrl-C make the ranks save and stop. Over several nodes mpirun does not say where the first rank is:
    mpi4py (epi-ds[mpi]) finds out, or set MASTER_ADDR and MASTER_PORT.
    """
    from epi_ds.launch.mpi import mpi_command, run
    from epi_ds.recipe.launch_target import find_target

    found = find_target(target, arguments or [], options=debug_options())
    command = mpi_command(
        found.command,
        starter,
        num_ranks=ranks,
        environment=os.environ,
        hosts=hosts,
        options=option or [],
    )
    if dry_run:
        typer.echo(shlex.join(command))
        return
    raise typer.Exit(run(command))


@app.command(epilog="Example: epi-ds launch slurm recipe.yaml --nodes 2 --gpus-per-node 8 --time 12:00:00 --submit")
def slurm(
    target: Target,
    arguments: Arguments = None,
    *,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="0 trains on the CPU.")] = 0,
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, help="Default: one for each GPU; without any the recipe's ranks, or 1.")
    ] = None,
    cpus_per_rank: Annotated[int | None, typer.Option(min=1)] = None,
    time: Annotated[str | None, typer.Option(help="As sbatch wants it: 4:00:00, 2-0, 90.")] = None,
    partition: Annotated[str | None, typer.Option()] = None,
    account: Annotated[str | None, typer.Option()] = None,
    qos: Annotated[str | None, typer.Option()] = None,
    memory: Annotated[str | None, typer.Option(help="Of a node, such as 200G.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="A further option of sbatch; may be repeated.")] = None,
    name: Annotated[str | None, typer.Option(help="Default: that of the recipe or script.")] = None,
    grace: Annotated[int, typer.Option(min=1, help="Seconds before the time limit at which ranks save.")] = 120,
    retries: Annotated[int, typer.Option(min=0, help="How often a job that failed is queued again.")] = 2,
    sweep: Annotated[
        list[str] | None, typer.Option(help="key=value,value,...: an array, a task for each; may be repeated.")
    ] = None,
    parallel: Annotated[int | None, typer.Option(min=1, help="Tasks of the array at the same time.")] = None,
    by_stage: Annotated[bool, typer.Option("--by-stage", help="A chain of jobs, one for each stage.")] = False,
    after: Annotated[str | None, typer.Option(help="Id of a job that has to end well before.")] = None,
    container: Annotated[Container, typer.Option()] = Container.NONE,
    image: Annotated[str | None, typer.Option(help="Of the container: a .sif file, or what Pyxis pulls.")] = None,
    mount: Annotated[list[str] | None, typer.Option(help="SOURCE:TARGET; may be repeated.")] = None,
    python: Annotated[str | None, typer.Option(help="Default: this one; in a container, its python3.")] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Submit what was written.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Write a batch script that trains under Slurm, a rank for each task of srun and no ssh, and submit it.

    It lies beside the run, to be read and changed. A job that is preempted, requeued or out of time saves, is queued
    again and goes on.
    """
    from epi_ds.recipe.launch_target import find_target
    from epi_ds.recipe.slurm_jobs import folder_of, jobs_of

    found = find_target(target, arguments or [], options=debug_options())
    given = {"time": time, "partition": partition, "account": account, "qos": qos, "mem": memory}
    job = SlurmJob(
        name=name or found.name,
        command=found.command,
        folder=folder_of(found, Path.cwd()),
        working_directory=Path.cwd(),
        nodes=nodes,
        ranks_per_node=ranks_per_node or gpus_per_node or found.ranks_per_node(nodes),
        gpus_per_node=gpus_per_node or None,
        cpus_per_rank=cpus_per_rank,
        options=(*(f"--{key}={value}" for key, value in given.items() if value is not None), *(option or [])),
        grace_seconds=grace,
        retries=retries,
        parallel=parallel,
        image=Image(container, image, tuple(mount or ())),
        python=python or (sys.executable if container is Container.NONE else "python3"),
    )
    _hand_over(jobs_of(found, job, sweep=sweep or [], by_stage=by_stage), after=after, submit=submit, dry_run=dry_run)


def _hand_over(jobs: list[SlurmJob], *, after: str | None, submit: bool, dry_run: bool) -> None:
    """Print or write the scripts, and submit them or say how."""
    for one in jobs:
        if dry_run:
            typer.echo(one.render())
        else:
            one.write()
            typer.echo(one.path)
    if submit and not dry_run:
        for number in submit_jobs(jobs, after=after):
            typer.echo(f"submitted job {number}")
        return
    typer.echo("submit with:")
    for one, before in zip(jobs, [after, *(f"<job of {one.name}>" for one in jobs)], strict=False):
        typer.echo(f"  {shlex.join(submit_command(one, after=before))}")
