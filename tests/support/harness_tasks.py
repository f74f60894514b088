"""Task files of one's own for lm-evaluation-harness, with their rows: one of each kind of request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.support.tables import write_lines

CHOICES, TEXTS, ANSWERS = "own_choices", "own_texts", "own_answers"
ALL = (CHOICES, TEXTS, ANSWERS)
SAMPLED = "own_samples"
"""Answers that are drawn; the score sees every character of them."""

_ROWS: dict[str, list[dict[str, Any]]] = {
    # Choices of one token, of several, and questions of other lengths.
    CHOICES: [
        {
            "question": f"{'What comes next? ' * (1 + 4 * (i % 3))}{i} {i + 1}",
            "choices": [f" {i + 2}", " no", " a b"],
            "gold": 0,
        }
        for i in range(7)
    ],
    TEXTS: [{"text": f"Number {i} follows {i - 1}. " * (3 + 4 * i)} for i in range(3)],
    ANSWERS: [{"question": f"{'Please. ' * i}Say {i}:", "answer": str(i)} for i in range(5)],
}
_FILES: dict[str, dict[str, Any]] = {
    CHOICES: {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "target_delimiter": "",
    },
    TEXTS: {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"},
    ANSWERS: {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}
_ROWS[SAMPLED] = _ROWS[TEXTS]
_FILES[SAMPLED] = {
    "output_type": "generate_until",
    "doc_to_text": "Write:",
    "doc_to_target": "{{text}}",
    "generation_kwargs": {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12},
    "metric_list": [{"metric": "chrf", "aggregation": "chrf", "higher_is_better": True}],
}


def write_tasks(folder: Path, **changes: Any) -> Path:
    """Write the files of all tasks into ``folder``; ``changes`` are keys of those of the multiple choice."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in _ROWS.items():
        data = write_lines(folder / f"{name}.jsonl", rows)
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        own = changes if name == CHOICES else {}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **source, **_FILES[name], **own}))
    return folder
