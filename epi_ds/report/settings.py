"""Settings of runs side by side: which were given, and where runs differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from epi_ds.report import told
from epi_ds.report.run import Run


class SettingRow(NamedTuple):
    """One setting of all runs of a report."""

    key: str
    values: tuple[str, ...]
    """By run, as a recipe has them."""
    is_given: tuple[bool, ...]
    """By run, whether it is not the default."""

    @property
    def differs(self) -> bool:
        """Whether runs have other values, and somebody said so: what a section that one run lacks leaves at its default
        says nothing more.
        """
        return len(set(self.values)) > 1 and (any(self.is_given) or told.NOTHING not in self.values)


def setting_rows(runs: Sequence[Run]) -> tuple[SettingRow, ...]:
    """Return all settings that any run has; of a run without a recipe those of isolation that its metrics have."""
    found = [_settings_of(run) for run in runs]
    keys = dict.fromkeys(key for one in found for key in one)
    absent = (told.NOTHING, False)
    return tuple(
        SettingRow(
            key,
            values=tuple(one.get(key, absent)[0] for one in found),
            is_given=tuple(one.get(key, absent)[1] for one in found),
        )
        for key in keys
    )


def _settings_of(run: Run) -> Mapping[str, tuple[str, bool]]:
    if run.settings:
        return {one.key: (told.setting(one.value), one.is_given) for one in run.settings}
    return {f"method.epi.{key}": (told.setting(value), False) for key, value in run.starts[-1].config.items()}


def environment_rows(runs: Sequence[Run]) -> tuple[SettingRow, ...]:
    """Return versions and machines of the runs' last starts; empty where earlier releases wrote them."""
    found = [run.starts[-1].environment for run in runs]
    keys = dict.fromkeys(key for one in found for key in one)
    return tuple(
        SettingRow(
            key.removesuffix("_bytes").replace("_", " "),
            values=tuple(_told(key, one.get(key)) for one in found),
            is_given=(False,) * len(runs),
        )
        for key in keys
    )


def _told(key: str, value: object) -> str:
    if isinstance(value, int) and key.endswith("_bytes"):
        return told.size(value)
    return told.NOTHING if value is None else told.setting(value)
