"""General ability, by the tasks of lm-evaluation-harness on a model that is held here."""
