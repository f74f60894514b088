"""``epi-ds export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def export(
    checkpoint: Annotated[Path, typer.Argument(help="One checkpoint: a tag, or a trainer's checkpoint-N.")],
    output: Annotated[Path, typer.Argument(help="Folder to write to.")],
    model: Annotated[
        Path | None, typer.Option(help="Folder with configuration and tokenizer; default the checkpoint.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default as trained.")] = None,
    shard_size: Annotated[float, typer.Option(min=0, help="Most gigabytes in a file.")] = 5.0,
    verify: Annotated[bool, typer.Option("--verify", help="Read it back and compare every bit.")] = False,
    trust: Annotated[bool, typer.Option("--trust", help="Read a checkpoint that lies outside of its run.")] = False,
) -> None:
    """Write a checkpoint as a Hugging Face model: safetensors, configuration, tokenizer. Needs no rank and no GPU."""
    from epi_ds.launch.environment import prepare_environment

    prepare_environment()
    from epi_ds.checkpoint.catalog import open_checkpoint
    from epi_ds.checkpoint.tag import Consent, open_tag
    from epi_ds.inspect.export import DTYPES, export_tag, verify_export

    if dtype is not None and dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r} is none of {', '.join(DTYPES)}", param_hint="--dtype")
    console = Console(soft_wrap=True, highlight=False)
    tag = open_tag(open_checkpoint(checkpoint), consent=Consent(trust, "pass --trust"))
    found = export_tag(
        tag,
        output,
        model=model or checkpoint,
        dtype=dtype,
        shard_bytes=int(shard_size * 1e9),
    )
    for path in found.files:
        console.print(f"written {path}")
    console.print(f"{found.num_tensors} tensors, {found.num_bytes / 1e9:.3f} GB, {found.dtype}")
    if verify:
        count = verify_export(tag, output, dtype=found.dtype)
        console.print(f"read back: {count} tensors have the bits of {tag.path}")
