"""``epi-ds bench``: the figures of docs/measured, measured on this machine."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from epi_ds.choices import StateFormat

app = typer.Typer(help="Measure what docs/measured states, on this machine.", no_args_is_help=True)


def _one_form(context: typer.Context, asked: bool) -> bool:
    """Refuse a second form of the output before minutes are spent: whichever option comes second sees the first."""
    if asked and (context.params.get("json") or context.params.get("markdown")):
        raise typer.BadParameter("--json and --markdown are two forms of one output; give one")
    return asked


Json = Annotated[bool, typer.Option("--json", callback=_one_form, help="Print one JSON object and nothing else.")]
Markdown = Annotated[
    bool, typer.Option("--markdown", callback=_one_form, help="Print a page with machine, versions and command.")
]


def _on_the_cpu() -> None:
    """Prepare a benchmark whose ranks talk over gloo and whose clock knows no device."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from epi_ds.launch.environment import prepare_environment

    prepare_environment()


@app.command(epilog="Example: epi-ds bench memory --world-sizes 2 --ratios 0.01")
def memory(
    world_sizes: Annotated[str, typer.Option(help="World sizes to start, separated by commas.")] = "1,2,3,4",
    ratios: Annotated[str, typer.Option(help="Isolation ratios, separated by commas.")] = "0.01,0.2,0.5",
    json: Json = False,
    markdown: Markdown = False,
) -> None:
    """Measure the bytes that isolation keeps on each rank, from the live tensors of real ZeRO-3 engines on the CPU."""
    _on_the_cpu()
    from epi_ds.bench.memory import measure_memory

    sizes = [int(size) for size in world_sizes.split(",")]
    rows = measure_memory(sizes, [float(ratio) for ratio in ratios.split(",")])
    _show([row._asdict() for row in rows], json=json, markdown=markdown)


@app.command(epilog="Example: epi-ds bench displacement --strength 4")
def displacement(
    strength: Annotated[float, typer.Option(min=0, help="Of the anchor.")] = 2.0,
    steps: Annotated[int, typer.Option(min=10, help="Of the middle length.")] = 120,
    json: Json = False,
    markdown: Markdown = False,
) -> None:
    """Measure how far an anchor lets weights move at several rates and lengths, on the CPU."""
    _on_the_cpu()
    from epi_ds.bench.displacement import measure_displacement

    with tempfile.TemporaryDirectory(prefix="epi_ds_bench_") as folder:
        rows = measure_displacement(strength, steps, Path(folder))
    _show([row._asdict() for row in rows], json=json, markdown=markdown)


@app.command(epilog="Example: epi-ds bench data --rows 30000")
def data(
    rows: Annotated[int, typer.Option(min=1000, help="Rows of the file that is prepared.")] = 300_000,
    processes: Annotated[int, typer.Option(min=1, help="Processes that tokenise.")] = 2,
    json: Json = False,
    markdown: Markdown = False,
) -> None:
    """Measure how long rows take from a file to what ranks map, and what memory the training process needs for them."""
    from epi_ds.bench.data import measure_data

    with tempfile.TemporaryDirectory(prefix="epi_ds_bench_") as folder:
        measured = measure_data(rows, processes, Path(folder))
    _show([measured._asdict()], json=json, markdown=markdown)


@app.command(epilog="Example: epi-ds bench sketch --steps 200")
def sketch(
    steps: Annotated[int, typer.Option(min=1, help="Training steps before the thresholds are searched.")] = 2000,
    ema_decay: Annotated[
        float, typer.Option(min=0, max=1, help="Of the importance; AdamW's beta2 is the same.")
    ] = 0.99,
    world_size: Annotated[int, typer.Option(min=1, help="Ranks of the bytes that are modelled.")] = 1024,
    json: Json = False,
    markdown: Markdown = False,
) -> None:
    """Measure thresholds and masks of every selection and state on the importance of a model in training."""
    from epi_ds.bench.sketch import measure_sketches
    from epi_ds.bench.training import train_states

    def report(step: int, loss: float) -> None:
        if step % 100 == 0:
            typer.echo(f"step {step} of {steps}: loss {loss:.3f}", err=True)

    trained = train_states(steps, ema_decay=ema_decay, report=report)
    _show([row._asdict() for row in measure_sketches(trained, world_size=world_size)], json=json, markdown=markdown)


@app.command(epilog="Example: epi-ds bench kernels --device cuda")
def kernels(
    threads: Annotated[str, typer.Option(help="Numbers of threads, separated by commas.")] = "1,2",
    numel: Annotated[int, typer.Option(min=1, help="Entries of the tensors.")] = 33_333_331,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each, of which the median counts.")] = 7,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json: Json = False,
    markdown: Markdown = False,
) -> None:
    """Measure the operations against an in-place pass over memory of the same size in the same run."""
    from epi_ds.launch.environment import prepare_environment

    prepare_environment()
    import torch

    from epi_ds.bench.kernels import measure_kernels

    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{device!r} is neither cpu nor cuda", param_hint="--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("there is no GPU that torch can use", param_hint="--device")
    counts = [int(count) for count in threads.split(",")]
    rows = measure_kernels(counts, numel=numel, repeats=repeats, device=device)
    _show([row._asdict() for row in rows], json=json, markdown=markdown)


@app.command(epilog="Example: epi-ds bench step --world-sizes 2 --states u16")
def step(
    world_sizes: Annotated[str, typer.Option(help="World sizes to start, separated by commas.")] = "2",
    states: Annotated[str, typer.Option(help="States, separated by commas; all by default.")] = "",
    offload: Annotated[str, typer.Option(help="no, yes or both.")] = "both",
    pairs: Annotated[
        int, typer.Option(min=0, help="Pairs of whole steps, for fp32 with update and u16 with reduction.")
    ] = 0,
    layers: Annotated[int, typer.Option(min=1, help="Of the model: 1.9 million parameters each, and 6.7 million.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Of each kind, whose medians are taken.")] = 15,
    json: Json = False,
    markdown: Markdown = False,
) -> None:
    """Measure what isolation adds to a step of plain ZeRO-3 on the CPU, on one engine whose class is switched."""
    _on_the_cpu()
    from epi_ds.bench.step import cases, measure_steps

    placements = {"no": [False], "yes": [True], "both": [False, True]}
    if offload not in placements:
        raise typer.BadParameter(f"{offload!r} is none of {', '.join(placements)}", param_hint="--offload")
    wanted = _states(states) if states else list(StateFormat)
    chosen = [case for case in cases() if case.offload in placements[offload] and case.state in wanted]
    sizes = [int(size) for size in world_sizes.split(",")]
    with tempfile.TemporaryDirectory(prefix="epi_ds_bench_") as folder:
        rows = measure_steps(sizes, chosen=chosen, pairs=pairs, folder=Path(folder), layers=layers, steps=steps)
    _show([row._asdict() for row in rows], json=json, markdown=markdown)


@app.command(epilog="Example: epi-ds bench save --folder /scratch/me")
def save(
    world_size: Annotated[int, typer.Option(min=1, help="Ranks that save.")] = 2,
    states: Annotated[str, typer.Option(help="States, separated by commas.")] = "u16",
    pairs: Annotated[int, typer.Option(min=1, help="Saves of each kind.")] = 7,
    layers: Annotated[
        int, typer.Option(min=1, help="Of the model: 1.9 million parameters each, and 6.7 million.")
    ] = 49,
    folder: Annotated[Path, typer.Option(help="Where to save, on the disk to be measured.")] = Path(),
    json: Json = False,
    markdown: Markdown = False,
) -> None:
    """Measure what checksums, fsync and the manifest add to DeepSpeed's own save of 100 million parameters."""
    _on_the_cpu()
    from epi_ds.bench.save import measure_saves

    chosen = _states(states)
    rows = measure_saves(world_size, states=chosen, pairs=pairs, layers=layers, folder=folder)
    _show([row._asdict() for row in rows], json=json, markdown=markdown)


def _states(names: str) -> list[StateFormat]:
    try:
        return [StateFormat(name) for name in names.split(",")]
    except ValueError:
        known = ", ".join(state.value for state in StateFormat)
        raise typer.BadParameter(f"{names!r} names another state than {known}", param_hint="--states") from None


def _show(rows: list[dict[str, Any]], *, json: bool, markdown: bool) -> None:
    from epi_ds.bench.result import heading_of, result_of, shown

    if json:
        typer.echo(result_of(rows).to_json())
        return
    if markdown:
        words = [word for word in sys.argv[1:] if word != "--markdown"]
        typer.echo(result_of(rows).to_markdown(shlex.join(["epi-ds", *words])))
        return
    table = Table(*(heading_of(name) for name in rows[0]))
    for row in rows:
        table.add_row(*(shown(name, value) for name, value in row.items()))
    # As wide as it is: a figure cut off by a narrow terminal is read as another one.
    Console(width=200).print(table)
