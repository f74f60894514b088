"""A tag in DeepSpeed's universal format, for programs that read that: a resume with epi_ds needs no conversion."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from epi_ds.checkpoint.deepspeed_files import SavedPartitions, universal_weights_file
from epi_ds.checkpoint.tag import Tag
from epi_ds.errors import CheckpointError, UserError


def convert(tag: Tag, output: Path) -> None:
    """Run DeepSpeed's converter on an opened tag, in sight of the user; then compare every weight it wrote.

    Raises UserError where the format cannot hold the tag, or ``output`` exists, and CheckpointError where the converter
    fails or wrote something else.
    """
    if output.exists():
        raise UserError(f"{output} exists; give a folder that does not")
    if tag.manifest.isolation.extra.swapped:
        raise UserError(f"{tag.path} was saved with NVMe offload, whose files DeepSpeed's converter does not read")
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(tag.path)]
    finished = subprocess.run([*command, "--output_folder", str(output)], check=False)
    if finished.returncode != 0:
        raise CheckpointError(f"DeepSpeed's converter ended with exit code {finished.returncode}; its output is above")
    saved = SavedPartitions(*tag)
    for name in saved.places:
        path = universal_weights_file(output, name)
        # Of ZeRO-3 a flat tensor.
        written = torch.load(path, map_location="cpu", weights_only=True)
        if not torch.equal(written.view(torch.int32), saved.weights(name).flatten().view(torch.int32)):
            raise CheckpointError(f"{path} is not the weight that was saved in {tag.path}; do not use {output}")


def losses(tag: Tag) -> Iterator[str]:
    """Yield what the universal format does not keep of a tag, a sentence each."""
    yield "importance, masks and counters of the isolation: DeepSpeed's format has no place for them"
    saved = SavedPartitions(*tag)
    groups = [{k: v for k, v in group.items() if k != "params"} for group in saved.param_groups]
    if any(group != groups[0] for group in groups):
        yield "hyper-parameters by parameter group: a load gives every group those of the first"
    kinds = {kind for index in range(len(tag.manifest.sub_groups)) for kind in saved.kinds(index)}
    if others := sorted(kinds - {"exp_avg", "exp_avg_sq"}):
        yield f"optimizer states other than Adam's: {', '.join(others)}"
