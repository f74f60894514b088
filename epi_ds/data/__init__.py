"""Training data: sources, formats and the built-in skill tasks."""
