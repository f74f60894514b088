"""Which settings go with which policy: what each begins from, and what would be ignored or cannot work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from epi_ds.choices import ADAPTIVE, Apply, Memory, PolicyName, Redraw, Selection, StateFormat

# What a policy begins from where that is not the default of every other; it holds for settings that are not given.
_DEFAULTS: Mapping[PolicyName, Mapping[str, Any]] = {
    PolicyName.RANDOM: {"selection": Selection.RAW_GLOBAL},
    PolicyName.MOMENTUM: {
        "selection": Selection.PER_LAYER,
        "layer": "tensor",
        "refresh_interval": 1,
        "apply": Apply.UPDATE,
    },
    PolicyName.HALF: {"selection": Selection.RAW_GLOBAL, "ratio": 0.5},
}
# Policies that select masks over and over, by a schedule of steps.
REFRESHING = frozenset({PolicyName.EVOLVING, PolicyName.INVERTED, PolicyName.MOMENTUM})
# Policies whose first mask is selected after some steps, so that a short run may never have one.
BEGINNING_LATE = REFRESHING | {PolicyName.FIRST}
# Policies that rank entries by something else, and measure no importance.
UNMEASURED = frozenset({PolicyName.RANDOM, PolicyName.MOMENTUM, PolicyName.HALF})


def with_policy_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a section, with those that its policy begins from."""
    policy = values.get("policy")
    # Of an unknown one nothing is known; it is refused with the others.
    defaults = next((found for name, found in _DEFAULTS.items() if name == policy), {})
    return {**defaults, **values}


def decided_by(policy: PolicyName) -> list[str]:
    """Return the settings whose default is not that of every policy, or that a policy wants given."""
    wanted = ["ratio"] if policy is PolicyName.MOMENTUM else []
    return [*_DEFAULTS.get(policy, {}), *wanted]


def selects_by_steps(config: Any) -> bool:
    """Whether an `EPIConfig` selects new masks every ``refresh_interval`` steps."""
    redraws = config.policy is PolicyName.RANDOM and config.redraw is Redraw.REFRESH
    return config.policy in REFRESHING or redraws


def policy_problems(config: Any) -> Iterator[str]:
    """Yield one sentence per setting of an `EPIConfig` that its policy ignores, needs, or cannot work with."""
    given: set[str] = config.model_fields_set
    yield from _source_problems(config)
    yield from _schedule_problems(config, given)
    if config.policy is not PolicyName.RANDOM and "redraw" in given:
        yield f"redraw belongs to policy: random, and would be ignored by policy: {config.policy.value}; remove it"
    if config.policy is PolicyName.MOMENTUM:
        yield from _momentum_problems(config, given)
    if config.policy is PolicyName.HALF and config.ratio not in (0, 0.5):
        yield (
            f"policy: half isolates half of the matrices, and ratio is {config.ratio}; remove it, or set 0 for a run "
            "without isolation"
        )
    if config.policy in UNMEASURED:
        yield from _unmeasured_problems(config, given)


def _source_problems(config: Any) -> Iterator[str]:
    """Yield what is wrong with the source of a mask that the run does not select."""
    sources = [name for name in ("mask_from", "probe_steps") if getattr(config, name) is not None]
    remembers = config.memory is not Memory.NONE
    if config.policy is PolicyName.STATIC and len(sources) != 1 and not (remembers and not sources):
        yield (
            "policy: static needs exactly one source of its mask, mask_from or probe_steps, or memory of what is kept; "
            "got " + (" and ".join(sources) or "none")
        )
    if config.policy is PolicyName.STATIC and remembers and config.probe_steps is not None:
        yield (
            "probe_steps and memory both say what the mask of policy: static is selected from; remove probe_steps "
            "where it is what engine.epi.remember() has measured, else memory"
        )
    if config.policy is not PolicyName.STATIC and sources:
        yield f"{sources[0]} belongs to policy: static, but policy is {config.policy.value}"


def _schedule_problems(config: Any, given: set[str]) -> Iterator[str]:
    """Yield what a policy does not do along the run, and was asked for."""
    policy = config.policy.value
    if not selects_by_steps(config) and not isinstance(config.ratio, (float, str)):
        yield (
            f"a schedule of ratio needs masks that are selected during the run, and policy: {policy} selects none; "
            "give a number"
        )
    without = {
        "warmup_steps": config.policy in (PolicyName.STATIC, PolicyName.NONE, PolicyName.HALF),
        "hysteresis": config.policy not in (PolicyName.EVOLVING, PolicyName.INVERTED),
    }
    for name, is_ignored in without.items():
        if is_ignored and name in given:
            yield (
                f"{name} is about masks that are selected during the run, and would be ignored by policy: {policy}; "
                "remove it"
            )
    draws_once = config.policy in (PolicyName.RANDOM, PolicyName.HALF) and not selects_by_steps(config)
    if draws_once and "refresh_interval" in given:
        remedy = ", or set redraw: refresh" if config.policy is PolicyName.RANDOM else ""
        yield f"refresh_interval would be ignored by policy: {policy}, which does not refresh; remove it{remedy}"


def _momentum_problems(config: Any, given: set[str]) -> Iterator[str]:
    if "ratio" not in given:
        yield (
            "policy: momentum needs ratio, the share of every tensor that stands still: 0.85 moves the 15 % with the "
            "largest momenta (the paper's are 0.8 to 0.95)"
        )
    if config.apply is not Apply.UPDATE:
        yield (
            "policy: momentum ranks by the momenta of Adam, which apply: reduction clears behind isolated entries, so "
            "that they would stay isolated for ever; set apply: update"
        )
    if config.selection is not Selection.PER_LAYER or config.layer != "tensor":
        yield (
            "policy: momentum compares the entries of each tensor with one another; remove selection and layer, or set "
            "selection: per_layer and layer: tensor"
        )


def _unmeasured_problems(config: Any, given: set[str]) -> Iterator[str]:
    policy = config.policy.value
    if config.selection is Selection.NORMALIZED_GLOBAL:
        yield (
            f"selection: normalized_global normalises importance, and policy: {policy} measures none; remove it, or "
            "set selection: raw_global"
        )
    if config.policy is PolicyName.HALF and config.selection is Selection.PER_LAYER:
        yield "selection: per_layer would be ignored by policy: half, which chooses whole matrices; remove it"
    if config.state is StateFormat.ADAM or "ema_decay" in given:
        is_adam = config.state is StateFormat.ADAM
        name = "state: adam" if is_adam else "ema_decay"
        remedy = "set state: u16, which takes nothing here" if is_adam else "remove it"
        yield f"{name} is about importance, and policy: {policy} measures none; {remedy}"


def adaptive_problem(config: Any, name: str) -> str | None:
    """Return what to say of a setting that is ``adaptive`` under a policy without one; None where that works."""
    if getattr(config, name) != ADAPTIVE or config.policy is PolicyName.EVOLVING:
        return None
    reason = (
        "looks at masks of the most important entries"
        if config.policy in REFRESHING | UNMEASURED
        else "selects masks during the run"
    )
    return f"{name}: adaptive {reason}, and policy: {config.policy.value} does not"


def memory_problem(config: Any) -> str | None:
    """Return what to say of ``memory`` under a policy that cannot have it; None where it can.

    Policies that select by something else, or nothing, may: what must be kept is remembered before the first step.
    """
    if config.memory is Memory.NONE:
        return None
    if config.policy is PolicyName.INVERTED and config.memory is Memory.PER_TASK:
        return (
            "memory: per_task deals the most important entries to tasks, and policy: inverted isolates the least "
            "important; set memory: stage_max"
        )
    return None
