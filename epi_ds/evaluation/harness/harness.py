"""The tasks of a section, scored on whatever model is held."""

from __future__ import annotations

from lm_eval.evaluator import evaluate

from epi_ds.evaluation.harness.language_model import NAME, HarnessModel
from epi_ds.evaluation.harness.loading import FEWSHOT_SEED, Once, alone, load_tasks
from epi_ds.evaluation.harness.results import score_of
from epi_ds.evaluation.harness.surroundings import quiet, seeded
from epi_ds.evaluation.held import HeldModel
from epi_ds.evaluation.scores import Score
from epi_ds.recipe.harness import HarnessSection


class Harness:
    """Tasks of lm-evaluation-harness, loaded once and scored as often as asked for."""

    def __init__(self, section: HarnessSection, *, once: Once = alone) -> None:
        """Raises what `load_tasks` raises."""
        self._section = section
        self._loaded = load_tasks(section, once=once)

    def score(self, held: HeldModel) -> dict[str, Score]:
        """Score every task, by ``lm_eval/`` and its name. Collective where there are ranks, and equal on all of them.

        To be called without gradients, where torch's random states may change.
        """
        for task in self._loaded.tasks.values():
            # Every evaluation asks with the same solved examples.
            task.set_fewshot_seed(FEWSHOT_SEED)
        as_chat = self._section.apply_chat_template
        with quiet(), seeded():
            results = evaluate(
                HarnessModel(held, max_length=self._section.max_length),
                {"tasks": self._loaded.tasks, "groups": self._loaded.groups},
                limit=self._section.limit,
                # Errors of scores by drawing anew, which take minutes for a perplexity.
                bootstrap_iters=0,
                log_samples=False,
                apply_chat_template=as_chat,
                fewshot_as_multiturn=as_chat,
            )
        return {f"{NAME}/{name}": score_of(name, results) for name in self._loaded.shown}
