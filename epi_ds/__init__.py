"""Evolving parameter isolation for DeepSpeed ZeRO-3 (arXiv 2604.14010).

`initialize` and `attach` are for hand-written DeepSpeed loops, which `Preemption` tells when their job is about to end;
`EPICallback` is for Hugging Face and TRL trainers, which go on from `newest_checkpoint`; `ds_config` returns a shipped
DeepSpeed configuration for either. `write_own_rows` has a model write what it can, before it learns something else.
`QuantileSketch` is the mergeable summary of importance by itself.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from epi_ds.config import EPIConfig

if TYPE_CHECKING:
    from epi_ds.api import attach, initialize
    from epi_ds.checkpoint.loading import newest_checkpoint
    from epi_ds.ds_configs import load as ds_config
    from epi_ds.hf import EPICallback
    from epi_ds.isolation.search.quantile_sketch import QuantileSketch
    from epi_ds.own_rows.writing import write_own_rows
    from epi_ds.preemption import Preemption

__version__ = "0.1.0"
__all__ = [
    "EPICallback",
    "EPIConfig",
    "Preemption",
    "QuantileSketch",
    "__version__",
    "attach",
    "ds_config",
    "initialize",
    "newest_checkpoint",
    "write_own_rows",
]

# Importing the package must stay quick for a command line that only prints its help, and must not need transformers for
# a loop that does not use it: these are imported when they are asked for.
_HOMES = {
    "EPICallback": "epi_ds.hf.EPICallback",
    "Preemption": "epi_ds.preemption.Preemption",
    "QuantileSketch": "epi_ds.isolation.search.quantile_sketch.QuantileSketch",
    "attach": "epi_ds.api.attach",
    "ds_config": "epi_ds.ds_configs.load",
    "initialize": "epi_ds.api.initialize",
    "newest_checkpoint": "epi_ds.checkpoint.loading.newest_checkpoint",
    "write_own_rows": "epi_ds.own_rows.writing.write_own_rows",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOMES[name].rpartition(".")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    # What is imported when asked for is there for whoever looks, too.
    return sorted({*globals(), *_HOMES})
