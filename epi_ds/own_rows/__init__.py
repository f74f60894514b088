"""Rows that a model writes itself, before it is trained on others: what it can, in its own words."""
