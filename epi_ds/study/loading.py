"""Studies from YAML: found by name or path, and told in one message whatever is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from epi_ds.errors import UserError, nearest, problems_of, summarize
from epi_ds.recipe.document import read_yaml
from epi_ds.study.models import Study

_FOLDER = Path(__file__).parent


class Found(NamedTuple):
    """A study, and where its results are appended."""

    study: Study
    results: Path


def shipped_names() -> list[str]:
    """Names of the studies that come with the package."""
    return sorted(path.stem for path in (_FOLDER / "studies").glob("*.yaml"))


def load_study(name_or_path: str) -> Found:
    """Read and validate a study: a .yaml file, or a shipped one by its name.

    Results of a shipped study lie in the package, those of another beside its file. Raises one UserError that lists
    every problem found.
    """
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            raise UserError(f"there is no study file {name_or_path}")
        found = _read(path)
        return Found(found, path.parent / f"{found.name}.jsonl")
    if name_or_path not in shipped_names():
        raise UserError(
            f"{name_or_path!r} is neither a .yaml file nor a shipped study ({', '.join(shipped_names())})"
            f"{nearest(name_or_path, shipped_names())}"
        )
    return Found(_read(_FOLDER / "studies" / f"{name_or_path}.yaml"), _FOLDER / "results" / f"{name_or_path}.jsonl")


def _read(path: Path) -> Study:
    values = read_yaml(path.read_text(), place=str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping with the keys {', '.join(Study.model_fields)}")
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        raise UserError(summarize(problems_of(error, Study), place=f"the study {path}")) from None
