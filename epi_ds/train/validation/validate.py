"""`epi-ds validate`: everything that can be known of a recipe before its ranks start, all of it at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from epi_ds.isolation.fit import refresh_cost
from epi_ds.isolation.layout import Layout
from epi_ds.isolation.schedule import largest_ratio
from epi_ds.isolation.search.traffic import Cost
from epi_ds.policy_rules import REFRESHING
from epi_ds.recipe.advice import advice_on
from epi_ds.recipe.document import Document
from epi_ds.recipe.models import Recipe
from epi_ds.recipe.validation import check_thoroughly
from epi_ds.train.rows import RowArguments, global_batch_of, row_arguments_of
from epi_ds.train.validation.arguments import check_agreement, check_arguments, check_deepspeed
from epi_ds.train.validation.data import check_data
from epi_ds.train.validation.dry_run import DryRun, dry_run
from epi_ds.train.validation.findings import Finding, Findings, Kind
from epi_ds.train.validation.model import check_model
from epi_ds.train.validation.plan import PlannedStage, plan


class Validation(NamedTuple):
    """What is known of a recipe."""

    findings: tuple[Finding, ...]
    ranks: int
    global_batch: int | None = None
    """Rows of a step; None where the recipe does not say it."""
    stages: tuple[PlannedStage, ...] = ()
    """Empty where their steps are not known."""
    layout: Layout | None = None
    """Of the covered parameters; None where the model's configuration is not here."""
    refresh: Cost | None = None
    """What a refresh exchanges; None where masks are not selected, or the layers are not known."""

    dry_run: DryRun | None = None
    """What every rank has; None where no engine was made."""

    @property
    def is_valid(self) -> bool:
        """Whether no problem was found."""
        return not self.of(Kind.PROBLEM)

    def of(self, kind: Kind) -> list[Finding]:
        """Return the findings of a kind."""
        return [one for one in self.findings if one.kind is kind]

    def as_json(self, document: Document) -> dict[str, Any]:
        """Return it as plain values; findings with the line of the file, or the override, that they are about."""
        layers = (
            None if self.layout is None else dict(zip(self.layout.layer_names, self.layout.layer_numel, strict=True))
        )
        return {
            "recipe": str(document.path),
            "is_valid": self.is_valid,
            "findings": [{**one._asdict(), **_place_of(one.key, document)} for one in self.findings],
            "ranks": self.ranks,
            "rows_per_step": self.global_batch,
            "stages": [stage._asdict() for stage in self.stages],
            "layers": layers,
            "dry_run": None if self.dry_run is None else self.dry_run._asdict(),
            "refresh": None if self.refresh is None else self.refresh._asdict(),
        }


def validate(document: Document, *, ranks: int | None, makes_engine: bool = False) -> Validation:
    """Return everything that is wrong with a recipe, and what it would do.

    ranks         that will train; None for those of the recipe, or 1
    makes_engine  whether to make model and engine of so many ranks as well, see dry_run.py
    """
    findings = Findings()
    for problem in document.repeated_keys():
        findings.problem(problem)
    rest = check_thoroughly(document.values)
    for problem in rest.problems:
        findings.problem(problem)
    train = document.values.get("train", {})
    if isinstance(train, Mapping):
        check_deepspeed(train, findings)
    if rest.recipe is None:
        findings.unchecked("", "model, data and steps: the problems with the recipe itself come first")
        return Validation(_in_order(findings, document), ranks or 1)
    for advice in advice_on(rest.recipe):
        findings.warning(advice.key, advice.text)
    ranks = ranks or rest.recipe.ranks or 1
    known = _with_model_and_data(rest.recipe, rest.removed, findings, ranks=ranks)
    if makes_engine:
        known = known._replace(dry_run=_made(rest.recipe, known.layout, findings, ranks=ranks))
    return known._replace(findings=_in_order(findings, document))


def _with_model_and_data(recipe: Recipe, removed: Sequence[str], findings: Findings, *, ranks: int) -> Validation:
    """Check what a recipe names, and return what it would do.

    removed  keys that were wrong, without which it is this recipe
    """
    args = None
    if not any(key.split(".")[0] == "train" for key in removed):
        args = check_arguments(recipe, findings)
    if args is not None and not findings.of(Kind.PROBLEM):
        check_agreement(recipe, args, findings, ranks=ranks)
    arguments: RowArguments | None = None
    with findings.told("train"):
        arguments = row_arguments_of(recipe)
    model = check_model(recipe, arguments, findings)
    if model.tokenizer is None:
        findings.unchecked("train.max_length", "which rows are cut, and whether their answers are learnt")
    data = check_data(recipe, arguments, model.tokenizer, findings)
    global_batch = global_batch_of(recipe, ranks=ranks)
    stages: tuple[PlannedStage, ...] = ()
    if args is None or removed:
        findings.unchecked("", "the steps of the stages: the problems with the recipe itself come first")
    elif model.tokenizer is None and arguments is not None and arguments.packing:
        findings.unchecked("train.packing", "the steps of the stages: how rows are packed is not known without tokens")
    else:
        stages = plan(recipe, data, args, findings, global_batch=global_batch)
    refresh = None
    if model.layout is not None and largest_ratio(recipe.method.epi) and recipe.method.epi.policy in REFRESHING:
        refresh = refresh_cost(model.layout, recipe.method.epi, world_size=ranks)
    return Validation((), ranks, global_batch, stages, model.layout, refresh)


def _made(recipe: Recipe, layout: Layout | None, findings: Findings, *, ranks: int) -> DryRun | None:
    if layout is None or findings.of(Kind.PROBLEM):
        reason = "problems come first" if findings.of(Kind.PROBLEM) else "the model's parameters are not known here"
        findings.unchecked("", f"model and engine of {ranks} ranks: {reason}")
        return None
    with findings.told(""):
        return dry_run(recipe, ranks=ranks)
    return None


def _in_order(findings: Findings, document: Document) -> tuple[Finding, ...]:
    """Return the findings in the order of their lines; those about the whole come last."""
    return tuple(sorted(findings.found, key=lambda one: (not one.key, document.line_of(one.key))))


def _place_of(key: str, document: Document) -> dict[str, Any]:
    override = document.override_of(key)
    return {"line": None if override is not None or not key else document.line_of(key), "override": override}
