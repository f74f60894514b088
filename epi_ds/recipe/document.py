"""A recipe as it is written: its values in YAML, the line that each of them stands in, and overrides of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from epi_ds.errors import Problem, UserError


class _Loader(yaml.SafeLoader):
    """Reads ``1e-5`` as a number, as JSON and Python do; YAML 1.1 wants ``1.0e-5`` and makes a string of it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(text: str, *, place: str = "the text") -> Any:
    """Return what a text in YAML holds; ``1e-5`` is a number. Raises UserError, with the line, for what is no YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        said = getattr(error, "problem", None) or str(error)
        raise UserError(f"{place}{line}: no YAML: {said}; look for quotes, brackets and indentation there") from error


@dataclass
class Document:
    """The values of a recipe's file, with overrides."""

    path: Path
    values: dict[str, Any]
    root: yaml.MappingNode
    """The nodes of the file, which know their lines."""
    overrides: dict[str, str] = field(default_factory=dict)
    """What was given on the command line, by the key that it sets, positions for names."""

    def override(self, override: str) -> None:
        """Apply ``key=value``. Raises UserError for another form, and what `set_key` raises."""
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UserError(f"override {override!r} must have the form key=value, for example train.max_length=512")
        self.overrides[set_key(self.values, key, read_yaml(text, place=f"override {override!r}"))] = override

    def place_of(self, key: str) -> str:
        """Return where a dotted key stands: ``line 7``, or the override that set it.

        Of a key that is not there, where the section stands that lacks it.
        """
        override = self.override_of(key)
        return f"line {self.line_of(key)}" if override is None else f"override {override}"

    def override_of(self, key: str) -> str | None:
        """Return the override that set a dotted key; None where the file did."""
        return next((one for set_, one in self.overrides.items() if f"{key}.".startswith(f"{set_}.")), None)

    def line_of(self, key: str) -> int:
        """Return the line of the file, from 1, in which a dotted key stands, or the last part of it that is there."""
        node: yaml.Node = self.root
        line, rest = node.start_mark.line, key.split(".") if key else []
        while rest and (found := _child(node, rest)) is not None:
            line, node, rest = found
        return line + 1

    def repeated_keys(self) -> list[Problem]:
        """Return the keys that a mapping of the file has twice, of which YAML keeps the last without a word."""
        return list(_repeated(self.root, ""))


def read_document(path: Path, overrides: Sequence[str], *, keys: Sequence[str]) -> Document:
    """Read a recipe's file and apply overrides.

    keys  that the file may have, for messages

    Raises UserError for a file that is no YAML or holds no mapping, and what `Document.override` raises.
    """
    text = path.read_text(encoding="utf-8")
    values = read_yaml(text, place=str(path))
    root = yaml.compose(text, Loader=_Loader)
    if not isinstance(values, dict) or not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path} must hold a mapping with the keys {', '.join(keys)}")
    document = Document(path, values, root)
    for override in overrides:
        document.override(override)
    return document


def set_key(values: dict[str, Any], key: str, value: Any) -> str:
    """Set a dotted key in the values of a recipe, which are changed; sections that are not there are made.

    Return the key with positions in place of the names of list items. Raises UserError where a part of the key is a
    value and no section, or no item of a list.
    """
    *parents, last = key.split(".")
    node: Any = values
    path: list[str | int] = []
    for part in parents:
        if isinstance(node, list):
            index = _position(node, part, key)
            path.append(index)
            node = node[index]
        else:
            path.append(part)
            node = node.setdefault(part, {})
        if not isinstance(node, (dict, list)):
            raise UserError(f"override {key}: {part!r} is a value, not a section, in this recipe")
    place: Any = _position(node, last, key) if isinstance(node, list) else last
    node[place] = value
    return ".".join(map(str, [*path, place]))


def without(values: Mapping[str, Any], key: str) -> dict[str, Any] | None:
    """Return values without a dotted key, or without the last part of it that is there.

    None where that is an item of a list, whose others would move up, or the whole.
    """
    return _without(values, key.split(".")) if key else None


def _without(values: Any, parts: Sequence[str]) -> Any:
    if isinstance(values, Mapping):
        for count in range(1, len(parts) + 1):
            # A key may have dots in it.
            name = ".".join(parts[:count])
            if name in values:
                rest = _without(values[name], parts[count:]) if parts[count:] else None
                if rest is not None:
                    return {**values, name: rest}
                if parts[count:] and isinstance(values[name], list):
                    return None
                return {other: value for other, value in values.items() if other != name}
    elif isinstance(values, list) and parts[0].isdigit() and int(parts[0]) < len(values) and parts[1:]:
        index = int(parts[0])
        rest = _without(values[index], parts[1:])
        return None if rest is None else [*values[:index], rest, *values[index + 1 :]]
    return None


def _child(node: yaml.Node, parts: Sequence[str]) -> tuple[int, yaml.Node, list[str]] | None:
    """Return the line of what the first of ``parts`` name, counted from 0, its node and the parts behind."""
    if isinstance(node, yaml.MappingNode):
        # The last one of a repeated key is the one that counts.
        keys = {key.value: (key.start_mark.line, value) for key, value in node.value}
        for count in range(1, len(parts) + 1):
            if found := keys.get(".".join(parts[:count])):
                return *found, list(parts[count:])
    elif isinstance(node, yaml.SequenceNode) and parts[0].isdigit() and int(parts[0]) < len(node.value):
        item = node.value[int(parts[0])]
        return item.start_mark.line, item, list(parts[1:])
    return None


def _repeated(node: yaml.Node, key: str) -> Iterator[Problem]:
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for name, value in node.value:
            inner = f"{key}.{name.value}" if key else str(name.value)
            if name.value in lines:
                first = lines[name.value] + 1
                yield Problem(inner, f"stands here and in line {first}, of which YAML keeps the last; remove one")
            lines[name.value] = name.start_mark.line
            yield from _repeated(value, inner)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _repeated(item, f"{key}.{index}")


def _position(items: list[Any], part: str, key: str) -> int:
    """A list position: a number, or the ``name`` of one of its items."""
    names = [item.get("name") for item in items if isinstance(item, dict)]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(items):
        return int(part)
    known = ", ".join(str(name) for name in names)
    raise UserError(f"override {key}: {part!r} is not one of the {len(items)} items here ({known})")
