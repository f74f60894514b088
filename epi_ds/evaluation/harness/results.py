"""What lm-evaluation-harness found, as one score of each task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from epi_ds.errors import UserError
from epi_ds.evaluation.scores import Score

# The first of them that a task has is its score: shares of rows that are right, then losses.
_PREFERRED = (
    "acc_norm",
    "acc",
    "exact_match",
    "f1",
    "mcc",
    "bits_per_byte",
    "byte_perplexity",
    "word_perplexity",
    "perplexity",
)
# Given out of a hundred, where all others of their kind, and our own scores, are out of one.
_OF_HUNDRED = ("bleu", "chrf", "ter")


def score_of(name: str, results: Mapping[str, Any]) -> Score:
    """Return the score of a task or a group from what `lm_eval.evaluator.evaluate` returns.

    Of several filters of an answer the task's first one counts. Raises UserError for a task without a metric that says
    whether more is better.
    """
    found, directions = results["results"][name], results["higher_is_better"].get(name, {})
    # "acc,none" and "acc_stderr,none", beside "alias" and "sample_len".
    values: dict[str, float] = {}
    for key, value in found.items():
        metric, separator, _ = key.partition(",")
        if separator and isinstance(value, (int, float)) and isinstance(directions.get(metric), bool):
            values.setdefault(metric, float(value))
    metric = next((one for one in (*_PREFERRED, *values) if one in values), None)
    if metric is None:
        raise UserError(
            f"task {name} has no metric that is a number and says whether more of it is better: "
            f"{', '.join(key for key in found if ',' in key) or 'none at all'}; give metric_list with "
            "higher_is_better in its file, or leave it out"
        )
    value = values[metric] / 100 if metric in _OF_HUNDRED else values[metric]
    return Score(value, int(found["sample_len"]), directions[metric], metric=metric)
