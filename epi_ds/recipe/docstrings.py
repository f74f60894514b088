"""What is said of a setting: the text below its field in the source, for the pages of docs/ and for editors."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap

from pydantic import BaseModel


def docstrings_of(model: type[BaseModel]) -> dict[str, str]:
    """Return the text below each field in a model's source, base classes included, as Markdown on one line."""
    texts: dict[str, str] = {}
    for base in reversed([base for base in model.__mro__ if issubclass(base, BaseModel) and base is not BaseModel]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        # The statement of a class is one.
        body = definition.body if isinstance(definition, ast.ClassDef) else []
        for field, below in itertools.pairwise(body):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                texts[field.target.id] = one_line(str(below.value.value))
    return texts


def summary_of(model: type[BaseModel]) -> str:
    """Return the first paragraph of a model's docstring, which says what it is for, as Markdown on one line."""
    return one_line((model.__doc__ or "").split("\n\n")[0])


def one_line(text: str) -> str:
    """Return a docstring as Markdown on one line."""
    return " ".join(text.replace("``", "`").split())
