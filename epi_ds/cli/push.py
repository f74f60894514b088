"""``epi-ds push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def push(
    run: Annotated[Path, typer.Argument(help="The folder of a run that has ended.")],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME of the repository of models; it is made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make it for those alone who may see it.")] = False,
    token_file: Annotated[
        Path | None, typer.Option(help="File with a token of the hub; default HF_TOKEN or that of hf auth login.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Have a repository that holds something else hold this model alone.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write the card and list the files; no network.")] = False,
) -> None:
    """Push a run's model to the Hugging Face hub, with a card that says what was trained, protected and scored.

    The card is RUN/export/README.md. The end of the run writes it, and this where it is missing; edit it as you like.
    """
    from epi_ds.cli.report import record_of
    from epi_ds.report.card import ensure_card
    from epi_ds.report.hub import check_repo, push_folder, token_of
    from epi_ds.report.hub_files import package_of, staged
    from epi_ds.train.exported import export_of
    from epi_ds.train.run_folder import RunFolder

    check_repo(repo)
    token = None if dry_run else token_of(token_file)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    folder = export_of(run)
    card = ensure_card(record_of(RunFolder(run)), folder)
    console.print(f"card {'written' if card.is_new else 'as it stands'}: {card.path}")
    package = package_of(folder)
    for path in package.files:
        console.print(f"  {path.name}  {path.stat().st_size / 1e6:,.3f} MB")
    for path in package.left_out:
        console.print(f"left out, for it is no part of a model: {path}")
    if token is None:
        console.print(f"nothing was pushed; {package.num_bytes / 1e9:.3f} GB would be, to {repo}")
        return
    with staged(package) as files:
        pushed = push_folder(
            files, repo, token=token, private=private, overwrite=overwrite, message=f"Push the model of {run.name}"
        )
    console.print(
        f"{pushed.num_files} files were sent, {len(package.files) - pushed.num_files} were there: {pushed.url}"
    )
