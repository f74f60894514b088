"""Evolving parameter isolation for DeepSpeed ZeRO-3 (arXiv 2604.14010).

`initialize` and `attach` are for hand-written DeepSpeed loops, `EPICallback` for Hugging Face and TRL trainers;
`QuantileSketch` is the mergeable summary of importance by itself.
"""

from typing import TYPE_CHECKING, Any

from epi_ds.config import EPIConfig

if TYPE_CHECKING:
    from epi_ds.api import attach, initialize
    from epi_ds.hf import EPICallback
    from epi_ds.isolation.quantile_sketch import QuantileSketch

__version__ = "0.1.0"
__all__ = ["EPICallback", "EPIConfig", "QuantileSketch", "__version__", "attach", "initialize"]


def __getattr__(name: str) -> Any:
    # Importing the package must stay quick for a command line that only prints its help, and must not need
    # transformers for a loop that does not use it.
    if name in {"attach", "initialize"}:
        from epi_ds import api

        return getattr(api, name)
    if name == "EPICallback":
        from epi_ds.hf import EPICallback

        return EPICallback
    if name == "QuantileSketch":
        from epi_ds.isolation.quantile_sketch import QuantileSketch

        return QuantileSketch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
