"""Settings that cannot go together, found from the configurations alone: before a model is loaded or a rank waits.

What only an engine can tell is checked when isolation is attached to it (`epi_ds.zero3.guard`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from epi_ds.choices import Apply, PolicyName, Pull, StateFormat
from epi_ds.config import EPIConfig
from epi_ds.ds_configs.keys import KNOWN, misspelt, misspelt_problem
from epi_ds.errors import Problem, nearest

# Names under which a DeepSpeed configuration gives an Adam whose moments are known.
_ADAMS = ("adam", "adamw")
_OFFLOAD = "zero_optimization.offload_optimizer"


def combination_problems(ds_config: Mapping[str, Any], config: EPIConfig) -> list[str]:
    """Return one sentence per impossible combination of a DeepSpeed configuration and the ``epi`` settings.

    And per misspelt key at the top of the configuration, which DeepSpeed would ignore.

    Values that are missing, ``auto`` or no mapping where DeepSpeed wants one are left to DeepSpeed.
    """
    return [str(problem) for problem in located_combinations(ds_config, config)]


def located_combinations(ds_config: Mapping[str, Any], config: EPIConfig) -> list[Problem]:
    """Return the problems of which `combination_problems` makes sentences, by their keys of the configuration."""
    found = [*_zero_problems(ds_config, config), *_path_problems(ds_config), *_optimizer_problems(ds_config, config)]
    # One that hides the stage is named with it.
    misspelt_keys = [pair for pair in misspelt(ds_config) if not any(repr(pair[0]) in one.text for one in found)]
    return [*found, *(misspelt_problem(*pair) for pair in misspelt_keys)]


def stage_problem(stage: int, ds_config: Mapping[str, Any]) -> str:
    """Return what to say of a ZeRO stage other than 3, and of a misspelt section that may be the reason."""
    unknown = _other_zero_section(ds_config)
    hint = f" (ds_config has {unknown!r}{nearest(unknown, ['zero_optimization'])})" if unknown else ""
    return (
        f"ZeRO stage is {stage}{hint}, but importance is sharded beside stage 3 partitions; set "
        "zero_optimization.stage: 3"
    )


def reduction_optimizer_problem(optimizer: str) -> str:
    """Return what to say of ``apply: reduction`` with an optimizer that is no Adam."""
    return (
        f"apply: reduction sets the moments of Adam at release and does not know those of {optimizer}; use AdamW, or "
        "apply: update"
    )


def anchor_optimizer_problem(optimizer: str) -> str:
    """Return what to say of ``anchor.pull: gradient`` with an optimizer that is no Adam."""
    return (
        f"anchor.pull: gradient is in proportion to the size of gradients, which Adam divides by and {optimizer} does "
        "not; use AdamW, or anchor.pull: update"
    )


def adam_state_optimizer_problem(optimizer: str) -> str:
    """Return what to say of ``state: adam`` with an optimizer that is no Adam."""
    return (
        f"state: adam reads the second moments of Adam, and {optimizer} keeps none that are averages of squared "
        "gradients; use AdamW, or state: u8"
    )


def momentum_optimizer_problem(optimizer: str) -> str:
    """Return what to say of ``policy: momentum`` with an optimizer that is no Adam."""
    return (
        f"policy: momentum ranks by the momenta of Adam, and those of {optimizer} are not known; use AdamW, or another "
        "policy"
    )


def momentum_nvme_problem() -> str:
    """Return what to say of ``policy: momentum`` with moments on NVMe."""
    return (
        "offload_optimizer.device: nvme keeps the momenta on the disk, and policy: momentum reads them several times "
        "after every step; set offload_optimizer.device: cpu, or another policy"
    )


def adam_state_ratio_problem(ratio: float) -> str:
    """Return what to say of ``state: adam`` with an offload of a part of the optimizer."""
    return (
        f"offload_optimizer.ratio is {ratio}, and DeepSpeed saves no moments of the part that stays on the "
        "accelerator, which are the importance under state: adam; set state: u8, or offload_optimizer.ratio: 1.0"
    )


def adam_state_nvme_problem() -> str:
    """Return what to say of ``state: adam`` with moments on NVMe."""
    return (
        "offload_optimizer.device: nvme keeps the second moments on the disk, and state: adam reads them several "
        "times a refresh; set state: u8, or offload_optimizer.device: cpu"
    )


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name)
    return section if isinstance(section, Mapping) else {}


def _other_zero_section(ds_config: Mapping[str, Any]) -> str | None:
    """Return a key that may be meant for ``zero_optimization``: DeepSpeed takes it for none of its business."""
    return next((key for key in ds_config if key.startswith("zero") and key not in KNOWN), None)


def _zero_problems(ds_config: Mapping[str, Any], config: EPIConfig) -> Iterator[Problem]:
    zero = _section(ds_config, "zero_optimization")
    stage = zero.get("stage", 0)
    if isinstance(stage, int) and stage != 3:
        section = _other_zero_section(ds_config)
        yield Problem(section or "zero_optimization.stage", stage_problem(stage, ds_config))
    offload = _section(zero, "offload_optimizer")
    device, share = offload.get("device"), offload.get("ratio", 1.0)
    if device == "cpu" and config.state is StateFormat.ADAM and isinstance(share, (int, float)) and share != 1.0:
        yield Problem(f"{_OFFLOAD}.ratio", adam_state_ratio_problem(share))
    if device == "nvme" and config.state is StateFormat.ADAM:
        yield Problem(f"{_OFFLOAD}.device", adam_state_nvme_problem())
    if device == "nvme" and config.policy is PolicyName.MOMENTUM:
        yield Problem(f"{_OFFLOAD}.device", momentum_nvme_problem())


def _path_problems(ds_config: Mapping[str, Any]) -> Iterator[Problem]:
    zero = _section(ds_config, "zero_optimization")
    for name in ("offload_optimizer", "offload_param"):
        path = _section(zero, name).get("nvme_path")
        # As in a copy of a shipped configuration that transformers has read, and not we.
        if isinstance(path, str) and "${" in path:
            yield Problem(
                f"zero_optimization.{name}.nvme_path",
                f"{name}.nvme_path is {path!r}, and nobody replaces variables there, so that is the folder's name; "
                "write the folder itself, or pass epi_ds.ds_config(<the file>) instead of the file",
            )


def _optimizer_problems(ds_config: Mapping[str, Any], config: EPIConfig) -> Iterator[Problem]:
    optimizer = _section(ds_config, "optimizer")
    name = optimizer.get("type")
    if not isinstance(name, str) or name == "auto":
        return
    if name.lower() not in _ADAMS:
        if config.apply is Apply.REDUCTION:
            yield Problem("optimizer.type", reduction_optimizer_problem(name))
        if config.state is StateFormat.ADAM:
            yield Problem("optimizer.type", adam_state_optimizer_problem(name))
        if config.anchor is not None and config.anchor.pull is Pull.GRADIENT:
            yield Problem("optimizer.type", anchor_optimizer_problem(name))
        if config.policy is PolicyName.MOMENTUM:
            yield Problem("optimizer.type", momentum_optimizer_problem(name))
