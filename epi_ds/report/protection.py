"""What kept the model of a run from forgetting, in words: isolation, an anchor, rows that were kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from epi_ds.report.isolation_words import interval_told, ratio_told
from epi_ds.report.published import published, source_name, sources_in

_METHOD = "[EPI, arXiv 2604.14010](https://arxiv.org/abs/2604.14010)"
_TOWARDS = {"run": "what it was before the run", "stage": "what it was before its stage"}


def protection_told(method: Mapping[str, Any], summaries: Sequence[Mapping[str, Any]]) -> str:
    """Return a list in Markdown.

    method     the section of the recipe, with its defaults
    summaries  lines of the metrics that say what isolation came to; the last one counts
    """
    parts = [*_isolation(method["epi"], summaries), *_anchor(method["epi"].get("anchor")), *_kept(method.get("keep"))]
    if not parts:
        return "None: plain fine-tuning."
    preset = method.get("preset")
    return "\n".join(f"* {part}" for part in ([f"Preset `{preset}`, which came to:"] if preset else []) + parts)


def _isolation(epi: Mapping[str, Any], summaries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if epi["policy"] == "none" or epi["ratio"] == 0:
        return
    told = f"Isolation (policy `{epi['policy']}`): {ratio_told(epi['ratio'])} of the covered parameters do not move."
    if epi["policy"] == "evolving":
        told += f" Which ones is decided anew by their importance ({_METHOD}); refresh interval: {interval_told(epi)}."
    if epi.get("memory", "none") != "none":
        told += f" Importance of what was finished is remembered (`memory: {epi['memory']}`)."
    if summaries:
        last = summaries[-1]
        told += f" {last['achieved_ratio']:.2%} were isolated at the end; a mask was in force in "
        told += f"{last['active_share']:.0%} of the steps."
    yield told


def _anchor(anchor: Mapping[str, Any] | None) -> Iterator[str]:
    if anchor is None or not (anchor.get("strength") or anchor.get("decay")):
        return
    towards = _TOWARDS.get(anchor["to"], f"what it is in `{published(anchor['to'])}`")
    by = f"strength {anchor['strength']:g}" if anchor.get("strength") else f"decay {anchor['decay']:g}"
    weighed = ", in proportion to importance" if anchor.get("weight") == "importance" else ""
    yield f"Anchor: every covered weight is pulled back towards {towards} ({by}{weighed}, `pull: {anchor['pull']}`)."


def _kept(keep: Mapping[str, Any] | None) -> Iterator[str]:
    if keep is None:
        return
    names = [f"`{source_name(source)}`" for source in sources_in(keep.get("data"))]
    own = keep.get("self")
    rows = [*names, *([f"{own['rows']} rows that the model wrote itself before training"] if own else [])]
    told = f"Rows that were kept: {', '.join(rows)}."
    if keep.get("importance"):
        told += " Their importance was measured before training, and is protected."
    if keep.get("replay"):
        of_stages = " from them and from finished stages" if keep.get("replay_stages") else " from them"
        told += f" {keep['replay']:.2%} of every batch were drawn{of_stages}."
    yield told
