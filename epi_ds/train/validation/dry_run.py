"""A recipe's model and engine for any number of ranks, in one process and without a byte of weights.

torch's fake tensors have shapes and no storage, and its fake process group answers every collective at once. Under both
transformers makes the model from its configuration, ZeRO-3 partitions it for as many ranks as asked for, and isolation
is attached, all by the code that a run executes.

[Note: alone] In a process of its own: ZeRO-3 and the process group of torch are once per process, and their number of
ranks is decided by the environment. On the meta device, the other way to have no storage, ``zero.Init`` allocates the
partitions after all.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from epi_ds.config import SECTION
from epi_ds.data.once import as_json, error_of
from epi_ds.errors import RemedyError, UserError
from epi_ds.isolation.fit import refresh_cost
from epi_ds.launch.lost_ranks import die_with_parent
from epi_ds.recipe.models import Recipe

# Without LOCAL_SIZE DeepSpeed's operator for shared memory waits for the other ranks of the node.
_ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "LOCAL_SIZE": "1"}
_SAID_LINES = 3


class DryRun(NamedTuple):
    """What the first of so many ranks has; the others have as much, but for padding."""

    ranks: int
    num_parameters: int
    """Entries of the model's parameters, over all ranks."""
    partition_numel: int
    """Entries of the flat partitions that this rank trains, with padding."""
    num_sub_groups: int
    isolation_bytes: int
    """Of isolation's state that outlives a step, before the first one."""
    refresh_bytes: int
    """That a refresh sends."""
    checkpoint_bytes: int
    """Of a tag, over all ranks, before the first step."""


def dry_run(recipe: Recipe, *, ranks: int) -> DryRun:
    """Return what every one of ``ranks`` ranks would have.

    Raises UserError for what the engine or isolation refuses, and RemedyError where fake tensors cannot do what the
    engine does.
    """
    with tempfile.TemporaryDirectory(prefix="epi_ds_dry_run_") as folder:
        work, result = Path(folder) / "work", Path(folder) / "result"
        work.write_bytes(pickle.dumps(recipe))
        ended = subprocess.run(
            [sys.executable, "-m", __name__, str(work), str(result), str(ranks)],
            env={**os.environ, **_ENVIRONMENT},
            capture_output=True,
            text=True,
            check=False,
        )
        if not result.exists():
            said = " ".join(ended.stderr.strip().splitlines()[-_SAID_LINES:])
            raise RemedyError(f"the dry run ended with code {ended.returncode} and without a result: {said}")
        values = json.loads(result.read_text())
    if "message" in values:
        raise error_of(values)
    return DryRun(**values)


def _as_rank(recipe: Recipe, ranks: int) -> DryRun:
    """Make model and engine as the first of so many ranks, in this process; see [Note: alone]."""
    import deepspeed
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import AutoConfig, AutoModelForCausalLM

    import epi_ds
    from epi_ds.train.refusals import refused_by_libraries
    from epi_ds.train.validation.arguments import arguments_on_cpu, filled_config
    from epi_ds.zero3.persistence.contents import own_bytes_to_save

    section, args = recipe.model, arguments_on_cpu(recipe)
    # While it is there transformers has ZeRO-3 partition every model.
    filled = filled_config(recipe, args, ranks=ranks)
    # Behind the arguments: accelerate would look for the other ranks.
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks)})
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False)
    given = {} if section.attn_implementation is None else {"attn_implementation": section.attn_implementation}
    with FakeTensorMode(allow_non_fake_inputs=True):
        config = AutoConfig.from_pretrained(section.path, revision=section.revision)
        model = AutoModelForCausalLM.from_config(config, **given)
        with refused_by_libraries():
            filled.trainer_config_finalize(args, model, 1)
        isolation = recipe.method.epi.as_section()
        engine, *_ = epi_ds.initialize(model=model, config={**filled.config, SECTION: isolation})
        layout, partitions = engine.epi.controller.layout, engine.optimizer.fp16_partitioned_groups_flat_numel
        return DryRun(
            ranks=ranks,
            num_parameters=sum(one.ds_numel for one in model.parameters()),
            partition_numel=sum(partitions),
            num_sub_groups=len(partitions),
            isolation_bytes=engine.epi.memory_report().total_bytes,
            refresh_bytes=refresh_cost(layout, recipe.method.epi, world_size=ranks).sent_bytes,
            checkpoint_bytes=own_bytes_to_save(engine) * ranks,
        )


def _main(work: Path, result: Path, ranks: int) -> None:
    # Nobody waits for it once the command is gone.
    die_with_parent(signal.SIGKILL)
    values: dict[str, Any]
    try:
        values = _as_rank(pickle.loads(work.read_bytes()), ranks)._asdict()
    except (UserError, RemedyError) as error:
        values = as_json(error)
    except Exception as error:
        # Whatever an engine does that a fake tensor cannot: the recipe may be right all the same.
        said = " ".join(str(error).split())[:500]
        values = as_json(RemedyError(f"fake tensors cannot make this engine ({type(error).__name__}: {said})"))
    result.write_text(json.dumps(values))
    # Threads and destructors of an engine without storage have nothing to end.
    os._exit(0)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
