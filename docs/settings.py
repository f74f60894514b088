"""Write the pages of settings from the models that validate them.

    python docs/settings.py

A setting's docstring is its text, so that page and program cannot say different things.
tests/unit/test_documentation.py fails where a committed page is not what this writes.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from epi_ds.config import EPIConfig
from epi_ds.recipe.docstrings import docstrings_of, summary_of
from epi_ds.recipe.models import Recipe
from epi_ds.study.models import Study

FOLDER = Path(__file__).resolve().parent
COMMAND = "python docs/settings.py"


class Page(NamedTuple):
    """One page: a model, its nested models, and what stands above them."""

    name: str
    title: str
    model: type[BaseModel]
    text: str


PAGES = (
    Page(
        "configuration.md",
        "Configuration",
        EPIConfig,
        """
Settings of isolation: the top-level `epi` section of a DeepSpeed configuration, `method.epi` of a recipe, or the
mapping that `epi_ds.EPICallback` and `epi_ds.attach` take. Unknown keys and impossible combinations are errors
before anything is loaded, all of them at once.
""",
    ),
    Page(
        "recipe-settings.md",
        "Recipe settings",
        Recipe,
        """
Every key of a recipe, which `epi-ds train` runs. [Recipes and data](recipes.md) says how to use them. A key can be
given on the command line too, with dots: `train.learning_rate=2e-5`, `stages.0.epochs=2`.
""",
    ),
    Page(
        "study-settings.md",
        "Study settings",
        Study,
        """
Every key of a study, which `epi-ds study run` runs. [Studies](study.md) says what is measured and compared. Unknown
keys and names of arms that there are not are errors before anything runs, all of them at once.
""",
    ),
)
# Models with a page of their own.
_HOMES = {page.model: page.name for page in PAGES}
# Of annotated_types, and how a reader says it.
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "pattern": "matches"}
_PLAIN = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`", Any: "any value"}


def type_of(annotation: Any, *, page: Page) -> str:
    """Return a type in a reader's words; models are links to where their keys stand."""
    if typing.get_origin(annotation) is Annotated:
        return type_of(typing.get_args(annotation)[0], page=page)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(type_of(part, page=page) for part in arguments if part is not type(None))
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return f"list of {type_of(arguments[0], page=page)}"
    if origin is dict:
        return f"mapping of {type_of(arguments[0], page=page)} to {type_of(arguments[1], page=page)}"
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    if issubclass(annotation, Enum):
        return " or ".join(f"`{member.value}`" for member in annotation)
    home = _HOMES.get(annotation, page.name)
    target = home if annotation in _HOMES else f"#{annotation.__name__.lower()}"
    return f"[{annotation.__name__}]({target})"


def rule_of(field: FieldInfo) -> str:
    """Return the bounds of a field, in words; empty where there are none."""
    found = []
    for bound in field.metadata:
        for name, words in _BOUNDS.items():
            if (value := getattr(bound, name, None)) is not None:
                found.append(f"{words} `{value}`")
    return " and ".join(found)


def default_of(field: FieldInfo) -> str:
    """Return a field's default as a recipe would have it."""
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, BaseModel):
        return "its defaults"
    if value is None:
        return "not set"
    if value in ((), {}):
        return "empty"
    shown = value.value if isinstance(value, Enum) else str(value).lower() if isinstance(value, bool) else value
    return f"`{shown}`"


def nested_models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """Yield a model and those inside it that have no page of their own, each once, in the order of their fields."""
    seen = [model]
    for current in seen:
        for field in current.model_fields.values():
            seen += [
                part
                for part in _parts(field.annotation)
                if isinstance(part, type) and issubclass(part, BaseModel) and part not in seen and part not in _HOMES
            ]
    yield from dict.fromkeys(seen)


def _parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in typing.get_args(annotation):
        yield from _parts(part)


def section_of(model: type[BaseModel], *, page: Page) -> str:
    """Return the table of a model's keys. Raises ValueError for a key that nothing is said of."""
    texts = docstrings_of(model)
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if (text := texts.get(name) or _summary_of(field.annotation)) is None:
            raise ValueError(f"{model.__name__}.{name} has no docstring; say in a sentence below it what it is")
        kind, rule = type_of(field.annotation, page=page), rule_of(field)
        cells = f"`{name}`", f"{kind}, {rule}" if rule else kind, default_of(field), text
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines)


def _summary_of(annotation: Any) -> str | None:
    """Return the first sentence of the model that a section is, which says what the section is for."""
    models = [part for part in _parts(annotation) if isinstance(part, type) and issubclass(part, BaseModel)]
    return summary_of(models[0]) if models else None


def markdown_of(page: Page) -> str:
    """Return a whole page."""
    parts = [
        f"# {page.title}",
        f"<!-- Written by `{COMMAND}`: change the docstrings of the models instead. -->",
        page.text.strip(),
    ]
    for model in nested_models(page.model):
        if model is not page.model:
            parts += [f"## {model.__name__}", summary_of(model)]
        parts.append(section_of(model, page=page))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write all pages."""
    for page in PAGES:
        (FOLDER / page.name).write_text(markdown_of(page))


if __name__ == "__main__":
    main()
