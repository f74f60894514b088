"""Recipes shipped with the package, found by name."""
