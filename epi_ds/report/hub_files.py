"""Which files of an exported model are pushed to the hub, and as what: nothing else that lies in its folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from epi_ds.checkpoint.weights_folder import COMPANIONS
from epi_ds.report.card import FILE as CARD
from epi_ds.report.published import published

# No code, which nobody may run unasked.
_PUSHED = (CARD, "*.safetensors", "*.safetensors.index.json", *COMPANIONS, "adapter_config.json", "LICENSE*", "NOTICE*")
# Where libraries note what a model was loaded from.
_ORIGINS = ("_name_or_path", "name_or_path", "base_model_name_or_path")


class Package(NamedTuple):
    """Files of a folder, by whether they are pushed."""

    files: tuple[Path, ...]
    left_out: tuple[Path, ...]

    @property
    def num_bytes(self) -> int:
        """Of what is pushed."""
        return sum(path.stat().st_size for path in self.files)


def package_of(folder: Path) -> Package:
    """Return what is pushed of the folder of an exported model."""
    found = sorted(path for path in folder.iterdir() if path.name not in (".", ".."))
    pushed = [path for path in found if path.is_file() and any(path.match(pattern) for pattern in _PUSHED)]
    return Package(tuple(pushed), tuple(path for path in found if path not in pushed))


@contextmanager
def staged(package: Package) -> Iterator[Path]:
    """Yield a folder that holds what is pushed and nothing else, for the time of the block.

    Large files are links. Configurations that name the folder of this machine that a model was loaded from name the
    file alone.
    """
    with TemporaryDirectory(prefix="epi_ds_push_") as name:
        for path in package.files:
            cleaned = _cleaned(path) if path.suffix == ".json" and "config" in path.name else None
            if cleaned is None:
                (Path(name) / path.name).symlink_to(path.resolve())
            else:
                (Path(name) / path.name).write_text(json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n")
        yield Path(name)


def _cleaned(path: Path) -> dict[str, Any] | None:
    """Return a configuration without paths of this machine; None where there are none in it."""
    values = json.loads(path.read_text())
    cleaned = {key: published(value) if key in _ORIGINS else value for key, value in values.items()}
    return cleaned if cleaned != values else None
