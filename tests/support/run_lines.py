"""The lines of a small run's metrics, for tests of what reads them."""

from __future__ import annotations

from typing import Any

from epi_ds.report.run import Run, read_run


def evaluation(step: int, stage: str, **values: float | None) -> dict[str, Any]:
    scores = {
        name: {"value": value, "num_rows": 4, "higher_is_better": name != "nll"} for name, value in values.items()
    }
    return {"event": "evaluation", "step": step, "stage": stage, "scores": scores}


# As the first release wrote them: nothing of sources, importance, kinds, saves or the machine.
LINES: list[dict[str, Any]] = [
    {
        "event": "run", "step": 0, "stage": "a", "resumed": False, "world_size": 2, "total_steps": 4, "covered": 100,
        "stages": {"a": [0, 2], "b<": [2, 4]}, "config": {"policy": "evolving", "ratio": 0.1, "refresh_interval": 2},
    },
    evaluation(0, "start", a=0.25, b=0.0, nll=2.0),
    {"event": "step", "step": 1, "stage": "a", "loss": 2.0, "isolated": 0, "isolated_share": 0.0},
    evaluation(2, "a", a=0.75, b=0.0, nll=1.0),
    {
        "event": "refresh", "step": 2, "stage": "a", "jaccard": None, "isolated": 10,
        "layer_isolated": {"x": 4, "y": 6}, "layer_numel": {"x": 40, "y": 60},
    },
    {"event": "step", "step": 3, "stage": "b<", "loss": 1.0, "isolated": 10, "isolated_share": 0.1},
    evaluation(4, "b", a=0.5, b=1.0, nll=1.5),
]  # fmt: skip


def run_of(lines: list[dict[str, Any]], name: str = "mine", **known: Any) -> Run:
    return read_run(name, lines, place=f"runs/{name}", **known)
